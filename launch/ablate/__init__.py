"""What does each part of the method add? Train all variants from the same seeds, on the same samples, and compare.

plan         variants (rungs of the ladder, priors, sweeps) -> runs
running      train them, one process or launcher each, resumable
scores       what each run's record says in the end
statistics   means over seeds, differences paired by seed
table        markdown and JSON
draw         the ladder as a figure, and crops of the pictures
"""
