"""Use a latency oracle in your training loop: ``python examples/train_with_oracle.py T.parquet --target 0.05``.

An oracle answers for probabilities too: ``expected_latency`` of (..., D, K) probabilities is differentiable in torch,
so it is one more term of any loss. Here a made-up quality that likes wide layers stands for your task's loss; the
widths settle where the expected latency meets the target.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from latbench.oracle.lut import LutOracle
from latbench.tables import LatencyTable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="of a space whose options are numbers: latbench profile ...")
    parser.add_argument("--target", type=float, required=True, help="ms")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()

    oracle = LutOracle.fit(LatencyTable.read(args.table))
    decisions = oracle.space.decisions
    most = max(len(decision.options) for decision in decisions)
    gain = torch.full((len(decisions), most), -torch.inf)  # (D, K); what lies beyond an option's count cannot be chosen
    for row, decision in zip(gain, decisions, strict=True):
        row[: len(decision.options)] = torch.tensor(np.log(np.array(decision.options, float)))
    allowed = torch.isfinite(gain)

    logits = torch.zeros_like(gain, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    price = 0.0  # of latency: raised while the target is missed, lowered while it is met
    for step in range(args.steps):
        sharpness = 1 + 9 * step / args.steps  # one option each in the end
        probs = torch.softmax(sharpness * logits.masked_fill(~allowed, -1e9), -1)  # (D, K)
        quality = (probs * gain.masked_fill(~allowed, 0)).sum()
        over = oracle.expected_latency(probs.double()) / args.target - 1
        loss = -quality + price * over + 20 * torch.relu(over) ** 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        price = max(0.0, price + 0.5 * float(over.detach()))

    arch = tuple(int(i) for i in logits.masked_fill(~allowed, -1e9).argmax(-1))
    print("widths", *(d.options[i] for d, i in zip(decisions, arch, strict=True)))
    print(f"latency {oracle.latency(arch):.4f} ms, target {args.target:.4f} ms")


if __name__ == "__main__":
    main()
