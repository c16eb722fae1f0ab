"""The parts of `gpu_pass.py`: what has to be shown on a real GPU, and the tables made of it.

stage, results              what a stage is given, and the lines it writes; begin here
commands, provisions        what stages run, and what the machine may lack
ring, ring_plugin           stage "tests"
exactness                   stage "exactness"; its rows in exactness_data, its float64 answers in reference
sanitizers                  stage "sanitizers"
search                      stage "search"; clocks and bare rates in timing
tiles                       stage "tiles"; kernels and counters in profiles
training, sweep             the stages of these names; pictures and plain_model serve them
precompile                  kernels compiled side by side, for search and tiles
floors, predict             docs/explanations/performance.md: what no search can beat, and what is expected of ours
predict_training            what is expected of a step of training
measured, tables            the lines that were measured, and the tables made of them, in table_form
"""
