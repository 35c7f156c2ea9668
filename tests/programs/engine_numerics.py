"""The engine on a model of five weights; started by tests/test_engine.py on two ranks: CONFIG.json REPORT.json."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

from graft.ranks import stop
from graft.recipe import Stage
from graft.train.engine import Engine, resolve_ds_config, start_process_group
from graft.train.step import train_step

RATES = {"fast": 0.1, "slow": 0.01}


class Five(nn.Module):
    """Every trained weight gets ``x`` as its gradient; the frozen bf16 one gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x: float) -> torch.Tensor:
        return (self.fast.sum() + self.slow.sum()) * x + 0 * self.frozen.float().sum()


def make(weights: dict | None = None) -> tuple[Five, Engine]:
    model = Five()
    if weights:
        model.load_state_dict(weights)
    settings = Stage(max_grad_norm=1e9)
    return model, Engine(model, RATES, settings, resolve_ds_config(sys.argv[-2], settings, "fp32"), ranks)


def step(engine: Engine, values: list[float], share: float = 0.5) -> tuple[float, bool]:
    with engine.one_reduction():
        for value in values:
            engine.backward(engine(x=value))
    norm, applied = engine.step(share)
    return float(norm), applied


@contextlib.contextmanager
def collectives() -> Iterator[list[torch.Tensor]]:
    """What is handed to torch's reduce and all_reduce inside."""
    sent, originals = [], {name: getattr(dist, name) for name in ("reduce", "all_reduce")}
    for name, original in originals.items():

        def noted(tensor, *args, _original=original, **kwargs):
            sent.append(tensor)
            return _original(tensor, *args, **kwargs)

        setattr(dist, name, noted)
    yield sent
    for name, original in originals.items():
        setattr(dist, name, original)


def reductions(engine: Engine, values: list[float]) -> int:
    """Collectives that carry gradients in one step: those of whole buckets."""
    with collectives() as sent:
        step(engine, values)
    return sum(tensor.numel() > 1 for tensor in sent)


class Reads(TorchDispatchMode):
    """Counts what makes the host read a tensor."""

    num_reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_reads += func.overloadpacket.__name__ in {"_local_scalar_dense", "nonzero", "masked_select"}
        return func(*args, **(kwargs or {}))


def reads(engine: Engine, values: list[float]) -> tuple[int, int]:
    """How often the host reads a tensor: until gradients are reduced, and in the update."""
    with Reads() as making, engine.one_reduction():
        for value in values:
            engine.backward(engine(x=value))
    with Reads() as updating:
        engine.step(0.5)
    return making.num_reads, updating.num_reads


class Product(nn.Module):
    """One matrix, and a model's and a batch's ways to be called; ``dtype`` is that of its last product."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor, **others) -> SimpleNamespace:
        product = self.linear(x)
        self.dtype = product.dtype
        return SimpleNamespace(loss=product.float().sum())

    def model_inputs(self) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(2, 4)}


def precisions(precision: str) -> list[str]:
    """In what a product is made and in what its gradient travels, if torch answers as it does on a GPU.

    Asked whether autocast is on and not for which device, torch speaks of CUDA: on CPUs it never says yes.
    """
    model, settings, asked = Product(), Stage(), torch.is_autocast_enabled
    config = resolve_ds_config(sys.argv[-2], settings, precision)
    engine = Engine(model, {"linear.weight": 0.1}, settings, config, ranks)
    torch.is_autocast_enabled = lambda device="cpu": asked(device)
    with collectives() as sent:
        train_step(engine, [model], [0], 1, 1.0)
    torch.is_autocast_enabled = asked
    engine.close()
    dtypes = [model.dtype, *{tensor.dtype for tensor in sent if tensor.numel() > 1}]
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


def copied(model: nn.Module) -> dict:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def most_moved(before: dict, after: dict) -> float:
    return max((before[name].float() - tensor.float()).abs().max().item() for name, tensor in after.items())


ranks = start_process_group(timeout_s=60, start_timeout_s=120)
seen = {}
model, engine = make()
gloo = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
seen["timeouts"] = [backend.options._timeout.total_seconds() for backend in gloo]
with patch.object(get_accelerator(), "synchronize") as waits:
    for _ in range(4):  # DeepSpeed's clock starts with the third step
        step(engine, [1.0] * 4)
    seen["waits"] = waits.call_count
model, engine = make()
seen["small_gradients"], _ = step(engine, [1.0] + [0.001] * 63)
seen["first_update"] = [model.fast.abs().max().item(), model.slow.abs().max().item()]
seen["uneven"], _ = step(engine, [2.0] if ranks.rank == 0 else [3.0, 4.0])
seen["reductions"] = {"1 micro-batch": reductions(engine, [1.0]), "8 micro-batches": reductions(engine, [1.0] * 8)}
before = copied(model) | {key: moment.clone() for key, moment in engine.optimizer_state().items()}
_, applied = step(engine, [float("inf") if ranks.rank == 1 else 1.0])
moments, weights = engine.optimizer_state(), copied(model)
seen["not_finite"] = {"applied": applied, "moved": most_moved(before, weights | moments)}
seen["moments_nonzero"] = all(tensor.abs().min().item() > 0 for tensor in moments.values())
step(engine, [ranks.rank + 2.0])
straight = copied(model)
seen["offload"] = "offload" in Path(sys.argv[-2]).name
seen["reads"] = {"1 micro-batch": reads(engine, [1.0]), "8 micro-batches": reads(engine, [1.0] * 8)}
engine.close()
seen["precisions"] = {precision: precisions(precision) for precision in ("fp32", "bf16")}
model, engine = make(weights)
engine.load_optimizer_state(moments, num_updates=4)
step(engine, [ranks.rank + 2.0])
seen["resumed_equal"] = all(torch.equal(straight[name], tensor) for name, tensor in copied(model).items())
if ranks.is_first:
    Path(sys.argv[-1]).write_text(json.dumps(seen))
engine.close()
stop()
