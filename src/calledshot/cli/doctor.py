"""`shot doctor`: what this machine is and what it lacks."""

from dataclasses import asdict

from calledshot.machine import describe, diagnose
from calledshot.rundir import find_lab

from .arguments import Json, print_json, table

MARKS = {"good": "ok", "could be better": "--", "lacking": "!!"}


def doctor(*, json: Json = False) -> int:
    """What this machine is, what it lacks and the command that would fix it; exit code 1 if something cannot work."""
    lab, machine = find_lab(), describe()
    findings = diagnose(lab, machine)
    lacking = any(finding.level == "lacking" for finding in findings)
    if json:
        print_json({"machine": machine, "findings": [asdict(finding) for finding in findings], "lacking": lacking})
        return int(lacking)
    print(f"{machine['host']}: {machine['system']}, Python {machine['python']}\n")
    for row, finding in zip(
        table([(MARKS[one.level], one.subject, one.text) for one in findings]).splitlines(), findings, strict=True
    ):
        print(row)
        if finding.fix:
            print(f"      → {finding.fix}")
    return int(lacking)
