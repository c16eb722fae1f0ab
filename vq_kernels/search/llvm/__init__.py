"""The search as one loop in machine code, for the CPU."""
