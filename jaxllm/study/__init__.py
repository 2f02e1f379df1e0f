"""A paper's experiment: arms that are trained and measured, a table beside the paper's, orderings with their errors.

values.py    Arm, Study and what they are made of: what an experiment's author writes
single.py    one run of the loop, as `jaxllm train` does it
jobs.py      which runs a study consists of, and which name each has
results.py   the results file: one JSON line a run
running.py   runs what is missing
table.py     means, errors and verdicts
page.py      docs/results/NAME.md and the tables in the README
figures.py   plots that stand alone
command.py   the words of the command line
"""

from jaxllm.study.values import Arm, Column, Figure, Ordering, Row, Run, Study, starting_from

__all__ = ["Arm", "Column", "Figure", "Ordering", "Row", "Run", "Study", "starting_from"]
