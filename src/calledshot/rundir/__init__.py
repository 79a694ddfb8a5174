"""The run directory and a lab's records: the only code that writes or reads them. Standard library only."""

from calledshot.rundir.checkpoints import CheckpointFound, Checkpoints
from calledshot.rundir.files import JsonLines, atomic_write, parse_time, read_json, read_jsonl, utc_now, write_json
from calledshot.rundir.following import FollowedRun
from calledshot.rundir.lab import find_lab, resolve_checkpoint, resolve_run, runs
from calledshot.rundir.lock import RunLock
from calledshot.rundir.retention import Keep, held_out_by_step, record_export, uses
from calledshot.rundir.run import RunDirectory, State, is_run, read_metrics

__all__ = [
    "CheckpointFound",
    "Checkpoints",
    "FollowedRun",
    "JsonLines",
    "Keep",
    "RunDirectory",
    "RunLock",
    "State",
    "atomic_write",
    "find_lab",
    "held_out_by_step",
    "is_run",
    "parse_time",
    "read_json",
    "read_jsonl",
    "read_metrics",
    "record_export",
    "resolve_checkpoint",
    "resolve_run",
    "runs",
    "uses",
    "utc_now",
    "write_json",
]
