"""How fast an oracle answers. ``OMP_NUM_THREADS=1 python benchmarks/oracle_queries.py``.

22 sites of 9 options (FBNet's shape), and mobilenet_v1's chain of 15 sites, one thread. Beside them: the look-up that
published code does (a dictionary by site and option, a sum in Python; FBNet, once-for-all), and a gather in numpy.
Aims: 20 million architectures a second, 50 times the dictionary, one architecture within 20 us.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latbench.oracle.base import one_hot
from latbench.oracle.factors import Factor, FactorOracle
from latbench.provenance import Provenance
from latbench.spaces.base import Decision, SearchSpace
from latbench.spaces.mobilenet_v1 import MobileNetV1Space

SITES, OPTIONS = 22, 9
TURNS = 50


@dataclass(frozen=True)
class Layers(SearchSpace):
    """Decisions alone: a query asks no more of a space."""

    name: ClassVar[str] = "layers"

    @property
    def decisions(self):
        return tuple(Decision(f"op{i}", tuple(range(OPTIONS))) for i in range(SITES))

    def network(self, arch):
        raise NotImplementedError


def seconds(call: Callable[[], object]) -> float:
    """The least of many short turns: what others run on the machine only adds."""
    call()
    started, repeat = time.perf_counter(), 0
    while time.perf_counter() - started < 0.01:
        call()
        repeat += 1
    taken = []
    for _ in range(TURNS):
        started = time.perf_counter()
        for _ in range(repeat):
            call()
        taken.append((time.perf_counter() - started) / repeat)
    return min(taken)


def layers_oracle(rng) -> FactorOracle:
    factors = [Factor(f"layer{i}", (i,), rng.uniform(0.1, 1, OPTIONS)) for i in range(SITES)]
    return FactorOracle(Layers(), tuple(factors), Provenance("", "", ""))


def chain_oracle() -> FactorOracle:
    return FactorOracle.counting(MobileNetV1Space(), "macs")


def batched(name: str, oracle: FactorOracle, rng) -> float:
    """Prints and gives architectures a second."""
    n_options = np.array([len(d.options) for d in oracle.space.decisions])
    best = 0.0
    for dtype in (np.int64, np.uint8):
        archs = rng.integers(n_options, size=(100_000, len(n_options))).astype(dtype)
        rate = len(archs) / seconds(lambda archs=archs: oracle.latencies(archs))
        best = max(best, rate)
        print(f"{name}: latencies, 100,000 of {np.dtype(dtype).name:6s} {rate / 1e6:24.1f} million/s")
    return best


def published(oracle: FactorOracle, rng) -> float:
    """Architectures a second from a dictionary, one Python look-up a site; and from a numpy gather, printed."""
    table = {(i, k): float(ms) for i, f in enumerate(oracle.factors) for k, ms in enumerate(f.values)}
    archs = rng.integers(OPTIONS, size=(20_000, SITES))
    lists = archs.tolist()
    np.testing.assert_allclose([sum(table[i, k] for i, k in enumerate(a)) for a in lists], oracle.latencies(archs))
    dictionary = len(lists) / seconds(lambda: [sum(table[i, k] for i, k in enumerate(a)) for a in lists])
    values, sites = np.stack([f.values for f in oracle.factors]), np.arange(SITES)
    gather = len(archs) / seconds(lambda: values[sites, archs].sum(axis=1))
    print(f"layers: dictionary in Python {dictionary / 1e6:35.3f} million/s")
    print(f"layers: gather in numpy {gather / 1e6:40.1f} million/s")
    return dictionary


def single(name: str, oracle: FactorOracle, rng) -> None:
    arch = oracle.space.sample(rng)
    print(f"{name}: latency of one {1e6 * seconds(lambda: oracle.latency(arch)):41.2f} us")


def expected(name: str, oracle: FactorOracle, rng) -> None:
    try:
        import torch
    except ImportError:
        print("expected_latency in torch: not installed (pip install 'latbench[search]')")
        return
    torch.set_num_threads(1)
    n_options = [len(d.options) for d in oracle.space.decisions]
    masks = one_hot(oracle.space, np.zeros((1, len(n_options)), np.int64))[0]
    for d, n in enumerate(n_options):
        masks[d, :n] = 1
    for batch in (1, 256):
        logits = torch.tensor(
            np.where(masks > 0, rng.standard_normal((batch, *masks.shape)), -np.inf), dtype=torch.float32
        )
        logits.requires_grad_()

        def step(logits=logits) -> None:
            oracle.expected_latency(logits.softmax(-1)).sum().backward()
            logits.grad = None

        print(f"{name}: expected_latency, forward and backward, batch {batch:<4d} {1e6 * seconds(step):14.0f} us")


def main() -> None:
    rng = np.random.default_rng(0)
    layers, chain = layers_oracle(rng), chain_oracle()
    rate = batched("layers", layers, rng)
    batched("chain ", chain, rng)
    ratio = rate / published(layers, rng)
    print(f"layers: the batch over the dictionary {ratio:26.0f} x")
    for name, oracle in (("layers", layers), ("chain ", chain)):
        single(name, oracle, rng)
        expected(name, oracle, rng)


if __name__ == "__main__":
    main()
