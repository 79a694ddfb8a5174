"""Lists of recipes that belong together and are run, resumed and compared: ablations."""

from calledshot.experiment.analysis import Analysis, Budget, Effect
from calledshot.experiment.markdown import plan_markdown, report_markdown
from calledshot.experiment.matching import Cell, resolve, unmatched
from calledshot.experiment.outcomes import Outcome
from calledshot.experiment.plan import Plan, Run, chosen, make_plan, room, state
from calledshot.experiment.report import Remark, Report, Row, differences, make_report, plan_json
from calledshot.experiment.running import Ran, records, run_suite
from calledshot.experiment.suite import Arm, Size, Suite, load_suite, suites

__all__ = [
    "Analysis",
    "Arm",
    "Budget",
    "Cell",
    "Effect",
    "Outcome",
    "Plan",
    "Ran",
    "Remark",
    "Report",
    "Row",
    "Run",
    "Size",
    "Suite",
    "chosen",
    "differences",
    "load_suite",
    "make_plan",
    "make_report",
    "plan_json",
    "plan_markdown",
    "records",
    "report_markdown",
    "resolve",
    "room",
    "run_suite",
    "state",
    "suites",
    "unmatched",
]
