"""Pro-KD's trail: recording, annotating, following, and what it must equal."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, changed, doubtful_images, same
from hypothesis import given, settings
from hypothesis import strategies as st
from test_annealing_kd import one_stage, train

from kdbook.annealing_kd import AnnealingKD, phi
from kdbook.losses import soft_target_loss
from kdbook.models import image_net
from kdbook.progressive_kd import (
    ProgressiveKD,
    Trail,
    annotate_trail,
    departure,
    footsteps,
    recipe,
    trail_target,
)
from kdbook.training import CrossEntropy, LogitMSE, Progress, Recipe, fit

FAST = settings(max_examples=60, deadline=None)


def trailed(checkpoints=4, seed=0):
    "Rows whose trail turns and grows towards the last logits."
    data = doubtful_images(seed=seed)
    last = torch.tensor(data["teacher_logits"])
    start = torch.randn(last.shape, generator=torch.Generator().manual_seed(seed + 1))
    trail = torch.stack(
        [start + (last - start) * k / (checkpoints - 1) for k in range(checkpoints)], 1
    )
    return data.add_column("teacher_trail", trail.tolist()), trail


def after_stage_one(objective, rows):
    "A student after four epochs of `objective`."
    return train(one_stage(objective, 4), rows).student


def weights_of(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


# recording


def test_trail_keeps_what_training_had(tmp_path):
    "The last checkpoint is the trained model; recording does not disturb the training."
    from safetensors.torch import load_file

    data, trail = doubtful_images(), Trail((1, 3, 6), tmp_path / "trail")
    supervised = one_stage(CrossEntropy(), 2)
    recorded = train(Recipe(supervised.stages, (trail,)), data).student
    assert same(recorded, train(supervised, data).student)
    last = load_file(trail.path(6))
    assert all(torch.equal(last[k], v) for k, v in recorded.state_dict().items())
    assert sorted(p.name for p in trail.folder.iterdir()) == [
        "step-00001.safetensors",
        "step-00003.safetensors",
        "step-00006.safetensors",
    ]


def test_annotate_trail_is_annotate_at_each_place(tmp_path):
    data, trail = doubtful_images(), Trail((1, 6), tmp_path)
    train(Recipe(one_stage(CrossEntropy(), 2).stages, (trail,)), data)
    net = image_net(hidden=8, num_labels=4, pixels=16, seed=5)
    before = weights_of(net)
    rows = annotate_trail(data, net, trail, progress=False)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    logits = torch.tensor(rows["teacher_trail"])
    assert logits.shape == (48, 2, 4)
    assert torch.equal(logits[:, -1], torch.tensor(rows["teacher_logits"]))
    assert not torch.allclose(logits[:, 0], logits[:, 1])


def test_a_killed_teacher_leaves_whole_files(tmp_path):
    "kill -9 while checkpoints are written: every file that is there can be read."
    from safetensors.torch import load_file

    script = (
        "from kdbook.progressive_kd import Trail\n"
        "from kdbook.models import image_net\n"
        f"trail = Trail(range(1, 100000), {str(tmp_path)!r})\n"
        "net = image_net(hidden=512)\n"
        "for step in range(1, 100000): trail.keep(net, step)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while len(list(tmp_path.glob("step-*"))) < 20:
        assert child.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    files = list(tmp_path.glob("step-*"))
    assert len(files) >= 20
    names = set(image_net(hidden=512).state_dict())
    assert all(set(load_file(path)) == names for path in files)


# following


@FAST
@given(st.integers(2, 12), st.integers(1, 400))
def test_every_checkpoint_gets_its_share(checkpoints, steps):
    trail = torch.zeros(1, checkpoints, 2)
    shown = [trail_target(trail, s / steps)[1] for s in range(steps)]
    counts = [shown.count(j + 1.0) for j in range(checkpoints)]
    assert shown == sorted(shown)
    assert sum(counts) == steps and max(counts) - min(counts) <= 1


@FAST
@given(st.integers(2, 12))
def test_orders(checkpoints):
    forward = footsteps(checkpoints)
    detour = footsteps(checkpoints, "detour")
    assert sorted(detour) == forward
    assert detour[-1] == forward[-1] and detour[:-1] == forward[-2::-1]
    assert footsteps(checkpoints, "reversed") == forward[::-1]
    assert sorted(footsteps(checkpoints, "shuffled")) == forward
    for place in forward:
        assert footsteps(checkpoints, place + 1) == [place]


def test_annealed_scales_are_annealing_kds():
    ones = torch.ones(1, 5, 2)
    targets = [trail_target(ones, s / 5, annealed=True)[0] for s in range(5)]
    scales = [target[0, 0].item() for target in targets]
    assert scales == pytest.approx([phi(t, 5) for t in (5, 4, 3, 2, 1)])


def test_scaled_copies_are_annealing_kd_to_the_bit():
    data, trail = trailed()
    copies = torch.stack([phi(t, 4) * trail[:, -1] for t in (4, 3, 2, 1)], 1)
    copied = changed(data, "teacher_trail", copies.tolist())
    last = changed(data, "teacher_logits", trail[:, -1].tolist())
    annealed = after_stage_one(AnnealingKD(4), last)
    assert same(after_stage_one(ProgressiveKD(), copied), annealed)
    equal = changed(data, "teacher_trail", trail[:, -1:].expand(-1, 4, -1).tolist())
    assert same(after_stage_one(ProgressiveKD(annealed=True), equal), annealed)
    plain = after_stage_one(LogitMSE(), last)
    assert same(after_stage_one(ProgressiveKD(), equal), plain)
    assert same(after_stage_one(ProgressiveKD(path="mean"), equal), plain)


def test_kl_is_the_soft_target_loss():
    data, trail = trailed()
    net = image_net(hidden=8, num_labels=4, pixels=16)
    pixels = torch.tensor(data["pixel_values"])[:8]
    batch = dict(pixel_values=pixels, teacher_trail=trail[:8])
    objective = ProgressiveKD(loss="kl", temperature=3.0)
    total = objective(net, batch, Progress(step=99, steps=100)).total
    expected = soft_target_loss(net(pixels).logits, trail[:8, -1], 3.0)
    torch.testing.assert_close(total, expected)


def test_stage_two_does_not_see_the_teacher():
    data, trail = trailed()
    what = recipe(epochs=(2, 3), lr=5e-3, batch_size=16)
    start = train(Recipe(what.stages[:1]), data).student
    stage_two = Recipe(what.stages[1:])
    on_labels = lambda rows: fit(start, stage_two, rows, progress=False).student
    negated = changed(data, "teacher_trail", (-trail).tolist())
    assert same(on_labels(data), on_labels(negated))
    assert [s.objective.rows for s in what.stages] == ["all", "labelled"]


# measuring


@FAST
@given(st.floats(0.01, 50), st.integers(0, 999))
def test_departure_ignores_scale(scale, seed):
    z = torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(seed)).double()
    away, best = departure(z)
    z[:, 0] *= scale
    again, rescaled = departure(z)
    torch.testing.assert_close(away, again)
    torch.testing.assert_close(rescaled[0], scale * best[0])
    assert (0 <= away).all() and (away <= 2).all() and best[-1] == pytest.approx(1)


def test_jumps_add_up_to_at_least_the_whole_way():
    _, trail = trailed(6)
    jumps = lambda: (trail[:, 1:] - trail[:, :-1]).norm(dim=-1).sum(1)
    whole_way = (trail[:, -1] - trail[:, 0]).norm(dim=-1)
    torch.testing.assert_close(jumps(), whole_way)  # this trail is straight
    trail[:, 2] += 1
    assert (jumps() > whole_way).all()


def first_checkpoint_only():
    data, trail = trailed()
    return changed(data, "teacher_trail", trail[:, :1].tolist())


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: footsteps(1), ["at least 2", "got 1"]),
        (lambda: footsteps(4, 5), ["path=5", "1 to 4"]),
        (lambda: footsteps(4, 0), ["path=0", "1 to 4"]),
        (lambda: ProgressiveKD(path="backwards"), ["backwards"]),
        (lambda: ProgressiveKD(path=0), ["path=0"]),
        (lambda: ProgressiveKD(annealed="half"), ["half"]),
        (lambda: ProgressiveKD(loss="mae"), ["mae"]),
        (lambda: ProgressiveKD(loss="kl", temperature=0), ["temperature", "0"]),
        (lambda: departure(torch.zeros(4, 1, 2)), ["(4, 1, 2)"]),
        (lambda: Trail((3, 3), "x"), ["(3, 3)"]),
        (lambda: Trail((), "x"), ["()"]),
        (lambda: Trail((0, 3), "x"), ["(0, 3)"]),
        (lambda: trail_target(torch.zeros(4, 2), 0.0), ["(4, 2)"]),
        (lambda: ProgressiveKD(annealed=True, path="mean"), ["mean", "annealed"]),
        (
            lambda: after_stage_one(ProgressiveKD(), doubtful_images()),
            ["teacher_trail", "annotate_trail"],
        ),
        (
            lambda: after_stage_one(ProgressiveKD(path=7), trailed()[0]),
            ["path=7", "1 to 4"],
        ),
        (
            lambda: after_stage_one(ProgressiveKD(), first_checkpoint_only()),
            ["at least 2", "got 1"],
        ),
    ],
)
def test_bad_input_names_the_values(call, words):
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)


def test_missing_checkpoint_is_named(tmp_path):
    net = image_net(num_labels=4, pixels=16)
    with pytest.raises(FileNotFoundError, match="after 5 updates"):
        annotate_trail(doubtful_images(), net, Trail((5,), tmp_path))


def test_a_trail_gives_back_its_weights(tmp_path):
    trail, net = Trail((1, 2), tmp_path), image_net(4)
    trail.keep(net, 1)
    other = trail.load(image_net(4, seed=3), 1)
    assert same(other, net)
    with pytest.raises(FileNotFoundError, match="after 2 updates"):
        trail.load(image_net(4))
