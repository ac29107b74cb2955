"""`python -m fastvae bench`: the ops against what a user might pick instead, and against the limit.

A case (cases.py) is an op, a shape, a dtype, a direction and a number of threads. It is computed by
fastvae and by its peers (peers.py), whose results are held to a float64 reference (check.py) before
anything is timed; then all take turns, round by round, together with a copy of as many bytes as the
op must move (measure.py). What came out is a table and a JSON file (report.py) and a picture
(figure.py). `pytest benchmarks/` times the same cases under pytest-benchmark.
"""
