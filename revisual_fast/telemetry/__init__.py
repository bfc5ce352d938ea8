"""What a run shows and leaves behind: numbers (:mod:`.sinks`), a progress display, plots and a report.

Files of a run, in ``run.dir``: ``metrics.jsonl`` (one line per step), ``evaluations.jsonl``, ``samples.jsonl`` with
``samples/*.png``, ``tensorboard/``, ``plots/``, ``report.json`` and ``report.html``.
"""

from revisual_fast.telemetry.plots import plot_run
from revisual_fast.telemetry.progress import Progress
from revisual_fast.telemetry.report import write_report
from revisual_fast.telemetry.sinks import Telemetry, TelemetryError, read_jsonl

__all__ = ["Progress", "Telemetry", "TelemetryError", "plot_run", "read_jsonl", "write_report"]
