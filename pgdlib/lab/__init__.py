"""Around the core: what the notebooks need to run, keep, judge, draw and repeat a study."""
