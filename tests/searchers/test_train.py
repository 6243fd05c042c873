"""A run that is killed at any step ends as one that is not; and what training is made of."""

from __future__ import annotations

import math
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from latbench.errors import UsageError
from searchers.data import Batch, Batches, eval_transform
from searchers.results import read_history
from searchers.sources import open_data
from searchers.testing import InterruptedRunError, Watch
from searchers.train import Loop, Position, cosine, evaluate, mixup, recalibrate, soft_cross_entropy
from searchers.world import OutOfMemoryError, Update, World, memory_told

WORLD = World(torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def data(n=24, **changes):
    return Batches(open_data("digits"), "train", np.arange(n), eval_transform(8), **{"batch_size": 8, **changes})


def run(folder, *, watch=None, identity=None, epochs=3, save_every_s=0.0, free=()):
    """A classifier with dropout, noise of its own, momentum and a step that depends on the position."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
    update = Update(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), WORLD, clip=5.0)
    loop = Loop(
        folder,
        "search",
        {"net": net, "update": update},
        identity=identity or {"a": 1},
        epochs=epochs,
        seed=5,
        world=WORLD,
        reporter=watch,
        save_every_s=save_every_s,
    )
    resumed = loop.resume(free=free)

    def step(batch, at):
        noise = torch.from_numpy(loop.rng("noise").normal(0, 0.1, batch.images.shape)).float()
        loss = nn.functional.cross_entropy(net(batch.images + noise), batch.labels)
        update.backward(loss)
        update.step(cosine(0.1, at))
        return {"loss": float(loss.detach())}

    loop.run(data(), step, lambda epoch: {"told": float(epoch)})
    return net, loop, resumed


def figures(loop):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in loop.history]


@pytest.mark.parametrize("limit", range(1, 9))
def test_a_run_killed_at_any_step_ends_the_same(tmp_path, limit):
    whole, loop, _ = run(tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        run(tmp_path / "parts", watch=Watch(limit))
    watch = Watch()
    parts, again, resumed = run(tmp_path / "parts", watch=watch)
    assert resumed == (limit > 1)
    assert watch.steps == 9 - (limit - 1), "what was saved is not done again"
    for one, other in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert figures(again) == figures(loop)
    rows = read_history(tmp_path / "parts" / "search.parquet")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert all(row["seconds"] > 0 for row in rows)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    run(tmp_path, epochs=1)
    before = (tmp_path / "search.ckpt").read_bytes()
    with pytest.raises(UsageError, match=r"other settings.*a: 1 / 2"):
        run(tmp_path, identity={"a": 2}, epochs=1)
    with pytest.raises(UsageError, match="epochs: 1 / 2"):
        run(tmp_path, epochs=2)
    assert (tmp_path / "search.ckpt").read_bytes() == before
    watch = Watch()
    run(tmp_path, identity={"a": 2}, epochs=1, free=["a"], watch=watch)
    assert watch.steps == 0, "finished, and `a` no longer matters"


def test_what_is_free_is_not_while_training_goes_on(tmp_path):
    with pytest.raises(InterruptedRunError):
        run(tmp_path, watch=Watch(5))
    with pytest.raises(UsageError, match="other settings"):
        run(tmp_path, identity={"a": 2}, free=["a"])


@pytest.mark.parametrize("damage", ["cut", "noise", "other", "pickle", "compressed"])
def test_a_damaged_checkpoint_is_one_line(tmp_path, damage):
    run(tmp_path, epochs=1)
    path = tmp_path / "search.ckpt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "noise":
        path.write_bytes(bytes(range(256)))
    elif damage == "other":
        torch.save({"epoch": 1}, path)
    elif damage == "compressed":  # zeros without end in a few kilobytes
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        torch.save({"epoch": Position(0, 0, 1, 1)}, path)  # a class: weights_only refuses it
    with pytest.raises(UsageError, match="remove it to start again") as error:
        run(tmp_path, epochs=1)
    assert "\n" not in str(error.value)


def test_out_of_memory_is_one_line_with_a_way_out():
    with pytest.raises(OutOfMemoryError, match="64 images a step: take a smaller --batch-size"), memory_told(64):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(OutOfMemoryError), memory_told(64):
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="something else"), memory_told(64):
        raise RuntimeError("something else")


def test_the_cosine():
    def at(progress, epochs=90):
        return Position(int(progress), round(progress % 1 * 100), 100, epochs)

    assert cosine(0.025, at(0)) == 0.025
    assert cosine(0.025, at(10)) == pytest.approx(0.0242462, abs=1e-7)
    assert cosine(0.025, at(45)) == pytest.approx(0.0125)
    assert cosine(1.0, at(2.5), warmup=5) == pytest.approx(0.502)
    assert cosine(1.0, at(5), warmup=5) == 1.0


def test_soft_cross_entropy_is_torch_s():
    a, b = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7, requires_grad=True)
    want = nn.functional.cross_entropy(a, b.softmax(-1), reduction="none")
    torch.testing.assert_close(soft_cross_entropy(a, b), want)
    soft_cross_entropy(a, b).sum().backward()
    assert b.grad is None


def test_mixup():
    batch = Batch(torch.randn(6, 3, 4, 4), torch.arange(6))
    images, labels = mixup(batch, 6, 0.0, np.random.default_rng(0))
    assert torch.equal(images, batch.images)
    assert torch.equal(labels, torch.eye(6))
    images, labels = mixup(batch, 6, 1.0, np.random.default_rng(0))
    torch.testing.assert_close(labels.sum(1), torch.ones(6))
    torch.testing.assert_close(images, torch.einsum("nm,mchw->nchw", labels, batch.images))


def test_recalibration_is_the_mean_over_batches():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(4, 3, 8, 8) * 9)
    batches = data(batch_size=24)
    recalibrate(norm, batches, WORLD, steps=1)
    images = next(iter(batches.epoch(0))).images
    torch.testing.assert_close(norm.running_mean, images.mean((0, 2, 3)))
    assert (norm.momentum, norm.training) == (0.1, True)


def test_evaluation_counts_every_image():
    batches = data(n=21, shuffle=False)
    labels = torch.cat([b.labels for b in batches.epoch(0)])
    always = evaluate(lambda images: torch.eye(10)[0].repeat(len(images), 1) * 9, batches, WORLD)
    assert always["accuracy"] == pytest.approx(float((labels == 0).float().mean()))
    flat = evaluate(lambda images: torch.zeros(len(images), 10), batches, WORLD)
    assert flat["loss"] == pytest.approx(math.log(10))
