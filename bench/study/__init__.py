"""A study of post-training with params/tiny: rewards and few steps at equal CPU time.

`runs` is the table of runs, `training` runs one of them, `scoring` measures a model, `results` keeps what was measured,
`memory` the peaks of a step, and `page` draws the tables and the plot; `python -m bench.study` does all of it.
"""
