"""The tables of README.md and of docs/**/*.md, made from the committed results."""
