"""What test_hub.py runs in a process of its own: ``drive.py KERNEL_DIRECTORY REPOSITORY`` prints what it found as JSON.

HuggingFace's package ``kernels`` loads the directory; its ops are run before ``revisual_fast`` can be imported and
again beside it. Errors are relative, norm over norm, to float64 and full logits.
"""

import json
import os
import sys
from pathlib import Path

import torch
from kernels._rust import Digest, DigestAlgorithm, Metadata
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import kernels
from kernels import LocalLayerRepository, Mode, get_kernel, get_local_kernel, kernelize, use_kernel_mapping

DIRECTORY, REPOSITORY = Path(sys.argv[1]), sys.argv[2]
VARIANT = DIRECTORY / "build" / "torch-universal"
N, D, V, GATHERED = 19, 12, 131, 30
BACKENDS = ("torch", "triton")
SETTINGS = {"clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.1, "entropy_coef": 0.05}
torch.set_num_threads(1)


def inputs(dtype):
    g = torch.Generator().manual_seed(0)
    x = {name: torch.randn(*shape, generator=g) for name, shape in {"hidden": (N, D), "weight": (V, D)}.items()}
    x = {"hidden": x["hidden"], "weight": x["weight"] / 3, "bias": torch.randn(V, generator=g) / 2}
    x = {name: t.to(dtype).requires_grad_() for name, t in x.items()}
    targets, rows = torch.randint(V, (N,), generator=g), torch.randint(N, (GATHERED,), generator=g)
    logp = plain_rows(x["hidden"].double() @ x["weight"].double().T + x["bias"].double(), targets)[0].detach()
    noise = [torch.randn(N, generator=g).double() for _ in range(3)]
    fields = {"advantages": noise[0], "old_logp": logp + noise[1] / 3, "ref_logp": logp + noise[2] / 3}
    upstream = torch.randn(GATHERED, D, generator=g), torch.randn(N, generator=g), torch.randn(N, generator=g)
    return x, targets, rows, {k: v.to(dtype) for k, v in fields.items()}, [u.to(dtype) for u in upstream]


def plain_rows(logits, targets):
    logps = torch.log_softmax(logits, -1)
    return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def plain_loss(logp, entropy, advantages, old_logp, ref_logp):
    ratio, gap = (logp - old_logp).exp(), ref_logp - logp
    clipped = ratio.clamp(1 - SETTINGS["clip_low"], 1 + SETTINGS["clip_high"])
    policy = -torch.minimum(ratio * advantages, clipped * advantages)
    return (policy + SETTINGS["kl_coef"] * (gap.exp() - gap - 1) - SETTINGS["entropy_coef"] * entropy).mean()


def plain(dtype):
    """The results of ``run`` by plain torch, from full logits."""
    x, targets, rows, fields, (d_rows, d_logp, d_entropy) = inputs(dtype)
    logits = x["hidden"] @ x["weight"].T + x["bias"]
    logp, entropy = plain_rows(logits, targets)
    loss = plain_loss(logp, entropy, **fields)
    given = logits.detach().requires_grad_()
    from_logits = plain_loss(*plain_rows(given, targets), **fields)
    made = [loss, logp, entropy]
    gathered = x["hidden"][rows]
    policy = [*made, *torch.autograd.grad(loss, list(x.values()), retain_graph=True)]
    d_outputs = torch.autograd.grad([logp, entropy], list(x.values()), [d_logp, d_entropy], retain_graph=True)
    return {
        "linear_logprob": [logp, entropy, *d_outputs],
        "linear_policy_loss": policy,
        "policy_loss_from_logits": [from_logits, logp, entropy, *torch.autograd.grad(from_logits, given)],
        "gather_rows": [gathered, *torch.autograd.grad(gathered, x["hidden"], d_rows)],
    }


def run(package, backend):
    """Results and gradients of every op, and of the layers, in fp32."""
    x, targets, rows, fields, (d_rows, d_logp, d_entropy) = inputs(torch.float32)
    of, tensors, bias = (x["hidden"], x["weight"], targets), list(x.values()), x["bias"]
    tokens, objective = package.TokenBatch(**fields), package.PolicyObjective(**SETTINGS)
    own = {"backend": backend}

    def policy(out):
        return [out.loss, out.logp, out.entropy, *torch.autograd.grad(out.loss, tensors)]

    def rowwise(logp, entropy):
        return [logp, entropy, *torch.autograd.grad([logp, entropy], tensors, [d_logp, d_entropy])]

    def logits_loss(function, **options):
        logits = (x["hidden"] @ x["weight"].T + bias).detach().requires_grad_()
        given = logits * 1 if options.get("inplace") else logits
        out = function(given, **options)
        return [out.loss, out.logp, out.entropy, *torch.autograd.grad(out.loss, logits)]

    gathered = package.gather_rows(x["hidden"], rows, backend)
    logits_layer = package.PolicyLossFromLogits(objective, **own)
    return {
        "linear_logprob": rowwise(*package.linear_logprob(*of, bias=bias, **own)),
        "linear_policy_loss": policy(package.linear_policy_loss(*of, tokens, objective, bias=bias, **own)),
        "policy_loss_from_logits": logits_loss(
            lambda z, **o: package.policy_loss_from_logits(z, targets, tokens, objective, **own, **o)
        ),
        "gather_rows": [gathered, *torch.autograd.grad(gathered, x["hidden"], d_rows)],
        "LinearLogprob": rowwise(*package.LinearLogprob(**own)(*of, bias=bias)),
        "LinearPolicyLoss": policy(package.LinearPolicyLoss(objective, **own)(*of, tokens, bias=bias)),
        "PolicyLossFromLogits": logits_loss(lambda z: logits_layer(z, targets, tokens)),
        "inplace": logits_loss(
            lambda z, **o: package.policy_loss_from_logits(z, targets, tokens, objective, **own, **o), inplace=True
        ),
    }


def compiled(package, backend):
    """Each op under torch.compile, whole, as eager; and the ops that the dispatcher sees in the graphs."""
    x, targets, _, fields, (_, d_logp, d_entropy) = inputs(torch.float32)
    tokens, objective = package.TokenBatch(**fields), package.PolicyObjective(**SETTINGS)
    seen = set()

    def look(graph, of):
        graphs = [module.graph for module in graph.modules() if hasattr(module, "graph")]
        targets = {str(node.target) for part in graphs for node in part.nodes if node.op == "call_function"}
        seen.update(target for target in targets if "linear_" in target or "policy_loss" in target)
        return aot_eager(graph, of)

    def logprob(hidden, weight):
        logp, entropy = package.linear_logprob(hidden, weight, targets, backend=backend)
        return (logp * d_logp + entropy * d_entropy).sum()

    def policy(hidden, weight):
        return package.linear_policy_loss(hidden, weight, targets, tokens, objective, backend=backend).loss

    def from_logits(hidden, weight):
        return package.policy_loss_from_logits(hidden @ weight.T, targets, tokens, objective, backend=backend).loss

    def both(function):
        made = function(x["hidden"], x["weight"])
        return [made, *torch.autograd.grad(made, [x["hidden"], x["weight"]])]

    found = []
    for step in (logprob, policy, from_logits) if backend == "torch" else (policy,):
        torch.compiler.reset()
        pairs = zip(both(step), both(torch.compile(step, fullgraph=True, backend=look)), strict=True)
        found += [relative(a, b) for a, b in pairs]
    return {"errors": found, "ops": sorted(seen)}


def kernelized():
    """A model's own layer with its forward replaced by the kernel's layer: errors to its own forward."""

    class Rows(nn.Module):
        def forward(self, hidden, weight, targets):
            return plain_rows(hidden @ weight.T, targets)

    kernels.replace_kernel_forward_from_hub(Rows, "Rows")
    repository = LocalLayerRepository(DIRECTORY, layer_name="LinearLogprob")
    model, (x, targets, *_) = nn.ModuleDict({"rows": Rows()}), inputs(torch.float32)
    before = [*Rows.forward(None, x["hidden"], x["weight"], targets)]
    mode = Mode.TRAINING | Mode.TORCH_COMPILE
    with use_kernel_mapping({"Rows": {"cpu": {mode: repository}}}):
        kernelize(model, mode=mode, device="cpu", use_fallback=False)
    assert model["rows"].forward.__func__ is get_local_kernel(DIRECTORY).layers.LinearLogprob.forward
    after = [*model["rows"](x["hidden"], x["weight"], targets)]
    both = [[*out, *torch.autograd.grad(out[0].sum(), [x["hidden"], x["weight"]])] for out in (after, before)]
    return [relative(a, b) for a, b in zip(*both, strict=True)]


def relative(value, exact):
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def errors(results, exact):
    return {name: [relative(*pair) for pair in zip(results[name], exact[name], strict=True)] for name in exact}


def alone(report):
    """The kernel where ``revisual_fast`` cannot be imported; its results."""
    metadata = Metadata.read_from_file(VARIANT / "metadata.json")
    Digest.hash_variant(DigestAlgorithm.SHA256, VARIANT).validate(metadata.digest)
    hub = get_local_kernel(DIRECTORY)
    os.environ["LOCAL_KERNELS"] = f"somebody/revisual-fast={DIRECTORY}"
    by_name = get_kernel("somebody/revisual-fast", version=0, trust_remote_code=True)
    exact, results = plain(torch.float64), {backend: run(hub, backend) for backend in BACKENDS}
    report |= {
        "version": kernels.__version__,
        "name": hub.__name__,
        "id": metadata.id,
        "by_repository_name": by_name is hub,
        "public": {name: hasattr(hub, name) for name in hub.__all__},
        "backends": hub.available_backends("linear_policy_loss"),
        "plain": errors(plain(torch.float32), exact),
        "errors": {backend: errors(results[backend], exact) for backend in BACKENDS},
        "compiled": {backend: compiled(hub, backend) for backend in BACKENDS},
        "kernelized": kernelized(),
    }
    return hub, results


def beside(report, hub, results):
    """The package's own results, and the kernel's again, in the same process."""
    sys.path.append(REPOSITORY)  # behind the installed packages: its folder kernels/ is not the package
    import revisual_fast

    report["differences"] = {backend: differing(results[backend], run(revisual_fast, backend)) for backend in BACKENDS}
    report["changed"] = differing(results["torch"], run(hub, "torch"))
    report["own_ops"] = compiled(revisual_fast, "torch")["ops"]


def differing(one, other):
    return [name for name in one if not all(map(torch.equal, one[name], other[name]))]


if __name__ == "__main__":
    sys.modules["revisual_fast"] = None  # importing it is an error until this is deleted
    found = {}
    loaded = alone(found)
    del sys.modules["revisual_fast"]
    beside(found, *loaded)
    print(json.dumps(found))
