"""NVTX ranges: where they are, that they nest and end, and that nothing is left of them when nobody listens.

Whether they are on is decided at import, so that most of this happens in other processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from revisual_fast import ranges

ROOT = Path(__file__).parents[2]

RECORDER = '''
import json, sys, threading, types

events, elsewhere = [], []  # of the main thread, and of others

class annotate:
    """As nvtx's, but it writes down: what begins, and None where a range ends."""
    def __init__(self, message=None, color=None, domain=None, category=None, payload=None):
        assert domain == "revisual_fast", domain
        self.what = (message, payload)
    def write(self, what):
        (events if threading.current_thread() is threading.main_thread() else elsewhere).append(what)
    def __enter__(self):
        self.write(self.what)
    def __exit__(self, *exception):
        self.write(None)
        return False

sys.modules["nvtx"] = types.ModuleType("nvtx")
sys.modules["nvtx"].annotate = annotate
'''

INPUTS = """
import torch
from revisual_fast import PolicyObjective, TokenBatch, linear_logprob, linear_policy_loss
from revisual_fast.kernels import linear, plan

plan.CHUNK_BYTES["cpu"] = 3 * 16 * 4  # two chunks
plan.SAVED_BYTES["cpu"] = 0
torch.manual_seed(0)
hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
targets, tokens = torch.arange(6), TokenBatch(advantages=torch.ones(6))

def loss(hidden, weight, objective=PolicyObjective()):
    return linear_policy_loss(hidden, weight, targets, tokens, objective, backend="torch").loss
"""

GEMMS = ["logits GEMM", "rows", "row gradients", "dX GEMM", "dW GEMM"]


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process where nobody listens, unless ``environment`` says so."""
    clean = {k: v for k, v in os.environ.items() if k not in (ranges.SWITCH, ranges.TOOL)}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=clean)


def recorded(code: str, *arguments: object) -> list[list[Any]]:
    """The ranges of ``code`` as a tree: each is ``[name, payload, its ranges]``; those of a second thread come last.

    Fails unless every one ends.
    """
    done = python(RECORDER + code + "\nprint(json.dumps(events + elsewhere))", *arguments, REVISUAL_FAST_NVTX="1")
    assert done.returncode == 0, done.stderr
    root: list[list[Any]] = []
    open_ranges = [root]
    for event in json.loads(done.stdout.splitlines()[-1]):
        if event is None:
            open_ranges.pop()
            assert open_ranges, "a range ended that had not begun"
        else:
            children: list[list[Any]] = []
            open_ranges[-1].append([*event, children])
            open_ranges.append(children)
    assert len(open_ranges) == 1, "a range did not end"
    return root


def names(tree: list[list[Any]]) -> list[str]:
    return [name for name, _, _ in tree]


def inside(tree: list[list[Any]], *path: str) -> list[list[Any]]:
    """The ranges inside the first one of that path of names."""
    for name in path:
        tree = next(children for found, _, children in tree if found == name)
    return tree


def leaves(tree: list[list[Any]]) -> bool:
    return all(not children for _, _, children in tree)


def test_an_op_and_its_phases() -> None:
    tree = recorded(INPUTS + "loss(hidden, weight).backward()")
    assert names(tree) == ["revisual_fast.linear_policy_loss"]
    phases = inside(tree, "revisual_fast.linear_policy_loss")
    assert names(phases) == 2 * GEMMS
    assert leaves(phases)


def test_the_backward_passes_are_ranges_too() -> None:
    tree = recorded(
        INPUTS + "from revisual_fast import gather_rows\n"
        "logp, _ = linear_logprob(gather_rows(hidden, targets), weight, targets, backend='torch')\n"
        "logp.sum().backward()"
    )
    forward = ["revisual_fast.gather_rows", "revisual_fast.linear_logprob"]
    assert names(tree) == [*forward, "revisual_fast.linear_logprob_backward", "revisual_fast.gather_rows_backward"]
    assert names(inside(tree, forward[1])) == 2 * GEMMS[:2]
    assert names(inside(tree, "revisual_fast.linear_logprob_backward")) == 2 * GEMMS


def test_the_backward_passes_around_packed_rows() -> None:
    tree = recorded(
        "import torch\n"
        "from revisual_fast.ops import KVRows, gather_kv, mrope, mrope_axis, pack_embeddings\n"
        "ids, table = torch.arange(4), torch.ones(4, 8, requires_grad=True)\n"
        "x = pack_embeddings(ids, table, None, ids * 0 - 1).view(4, 2, 4)\n"
        "angles = ids.expand(3, -1), torch.ones(2), mrope_axis([1, 1, 0])\n"
        "q, k = mrope(x, 2 * x, *angles)\n"
        "k, v = gather_kv(k, 2 * x, KVRows.checked(ids, 4))\n"
        "(q.sum() + k.sum() + v.sum()).backward()"
    )
    forward = [f"revisual_fast.{op}" for op in ("pack_embeddings", "mrope", "gather_kv")]
    assert names(tree) == [*forward, *(f"{name}_backward" for name in reversed(forward))]


def test_ranges_end_where_an_op_raises() -> None:
    tree = recorded(
        INPUTS + "def wrong(logp, entropy, batch):\n"
        "    raise RuntimeError('mine')\n"
        "try:\n"
        "    loss(hidden, weight, wrong)\n"
        "except RuntimeError as error:\n"
        "    assert str(error) == 'mine'\n"
        "else:\n"
        "    raise AssertionError('no error')\n"
        "loss(hidden, weight)"
    )
    assert names(tree) == 2 * ["revisual_fast.linear_policy_loss"]  # the second one is not inside the first


def test_a_compiled_graph_stays_whole_and_its_op_is_a_range() -> None:
    tree = recorded(
        INPUTS + "step = torch.compile(lambda x: 2 * loss(2 * x, weight), fullgraph=True, backend='aot_eager')\n"
        "step(hidden).backward()\n"
        "from revisual_fast.ranges import ranged, span\n"
        "@ranged('mine')\n"
        "def mine(x):\n"
        "    with span('more'):\n"
        "        return x.sin()\n"
        "torch.testing.assert_close(torch.compile(mine, fullgraph=True, backend='aot_eager')(hidden), hidden.sin())"
    )
    assert names(tree) == ["revisual_fast.linear_policy_loss"]  # none from tracing, which also runs the fakes
    assert names(inside(tree, "revisual_fast.linear_policy_loss")) == 2 * GEMMS


RUN = """
from pathlib import Path
from tests.integration.conftest import write_small_run
from revisual_fast.config_file import load_config
from revisual_fast.curriculum import train

folder, model = map(Path, sys.argv[1:])
train(load_config(write_small_run(folder, model), ["train.max_steps=1"]))
"""


def test_the_phases_of_a_run(tmp_path: Path, tiny_vl: Path) -> None:
    tree = recorded(RUN, tmp_path, tiny_vl)
    assert names(tree) == ["evaluate", "stage warm", "stage rl", "report"]
    assert names(inside(tree, "stage warm")) == ["load", "step", "evaluate", "export", "checkpoint", "report"]
    assert names(inside(tree, "stage warm", "step")) == ["data", "update"]
    step = next(node for node in inside(tree, "stage rl") if node[0] == "step")
    assert step[1] == 1, "the payload is the step's number"
    assert names(step[2]) == ["rollout", "select", "update"]
    rollout = names(inside(step[2], "rollout"))
    assert (rollout[:3], rollout[-1]) == (["data", "weight sync", "prefill"], "collect")
    assert names(inside(step[2], "rollout", "collect")) == 4 * ["reward"], "one a group"
    assert rollout[3:-1] == [name for _ in range(8) for name in ("sample", "decode")][:-1]  # 8 tokens
    assert names(inside(step[2], "rollout", "prefill")) == ["pack", "vision tower", "embeddings", "text tower"]
    update = names(inside(step[2], "update"))
    assert update[:2] == ["old log-probs", "reference log-probs"]
    micro_batch = ["pack", "forward", "revisual_fast.linear_policy_loss", "backward"]
    one_update = rf"((?:{' '.join(map(re.escape, micro_batch))} )+)optimizer"
    assert re.fullmatch(f"{one_update} {one_update}", " ".join(update[2:]))  # rollout_batch is twice update_batch
    forward = inside(step[2], "update", "forward")
    assert names(forward) == ["vision tower", "embeddings", "text tower", "revisual_fast.gather_rows"]


def test_off_there_is_nothing() -> None:
    done = python(
        INPUTS + "import sys\n"
        "from revisual_fast import library, ranges\n"
        "assert not ranges.ENABLED\n"
        "loss(hidden, weight).backward()\n"
        "assert 'nvtx' not in sys.modules\n"
        "assert ranges.ranged('name')(loss) is loss\n"
        "assert ranges.span('one') is ranges.span('two', payload=2)\n"
        "assert not hasattr(library.linear_policy_loss.function, '__wrapped__')"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        ({ranges.TOOL: "/a/tool.so"}, True),
        ({ranges.TOOL: ""}, False),
        ({ranges.TOOL: "/a/tool.so", ranges.SWITCH: "0"}, False),
        ({ranges.TOOL: "/a/tool.so", ranges.SWITCH: ""}, True),
        ({ranges.SWITCH: "1"}, True),
    ],
)
def test_who_decides(environment: dict[str, str], on: bool) -> None:
    assert ranges._wanted(environment) is on


def test_an_unknown_switch_is_an_error() -> None:
    with pytest.raises(ValueError, match="REVISUAL_FAST_NVTX='yes' is unknown"):
        ranges._wanted({ranges.SWITCH: "yes"})


@pytest.mark.parametrize("variable", [ranges.SWITCH, ranges.TOOL])
def test_without_nvtx_the_error_says_what_to_do(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    for name in (ranges.SWITCH, ranges.TOOL):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ImportError, match=f"^{variable} is set.*pip install nvtx.*REVISUAL_FAST_NVTX=0"):
        ranges._annotate_of_nvtx()


def test_a_tool_sees_the_ranges(tmp_path: Path) -> None:
    """With the nvtx package itself, and a tool that is loaded as profilers are."""
    pytest.importorskip("nvtx", reason="needs the package nvtx")
    nvcc, library, source = shutil.which("nvcc"), tmp_path / "tool.so", Path(__file__).parent / "nvtx_tool.c"
    if nvcc is None:
        pytest.skip("needs nvcc, which finds NVTX's headers")
    subprocess.run([nvcc, "-shared", "-Xcompiler", "-fPIC", "-o", library, source], check=True)
    code = (
        "from revisual_fast.ranges import ranged, span\n"
        "with span('step', payload=7):\n"
        "    ranged('outer')(len)('')\n"
        "with span('step', payload=8):\n"
        "    pass\n"
    )
    done = python(code, NVTX_INJECTION64_PATH=str(library))
    assert done.returncode == 0, done.stderr
    begun = ["+ revisual_fast|step|7", "+ revisual_fast|outer|-1"]
    assert done.stderr.splitlines() == [*begun, *2 * ["- revisual_fast"], "+ revisual_fast|step|8", "- revisual_fast"]


def test_the_page_has_every_name() -> None:
    """docs/profiling.md, and of the ops' ranges those that FusedOp makes."""
    page = (ROOT / "docs/profiling.md").read_text()
    sources = [*ROOT.glob("kernels/*.py"), *ROOT.glob("revisual_fast/**/*.py")]
    text = "".join(path.read_text() for path in sources if path.name != "ranges.py")
    used = set(re.findall(r"\b(?:span|ranged|clock)\(f?\"([^\"{]+)", text))
    used |= {f"revisual_fast.{op}" for op in ("linear_policy_loss", "linear_logprob", "linear_logprob_backward")}
    assert len(used) > 30
    assert {name for name in used if not re.search(rf"\b{re.escape(name.strip())}\b", page)} == set()
