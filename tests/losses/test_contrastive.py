"""Contrastive and affinity losses against formulas written out, open_clip's own, and one process against two."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss

from fdl.losses.contrastive import (
    affinities,
    affinity_distillation,
    clamp_scale,
    info_nce,
    interactive_info_nce,
    logits_between,
    sigmoid_loss,
)


def unit(rows, width, seed):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


IMAGES, TEXTS, SCALE = unit(7, 5, 0), unit(7, 5, 1), 3.7
TEACHER_IMAGES, TEACHER_TEXTS, TEACHER_SCALE = unit(7, 9, 2), unit(7, 9, 3), 6.1


def teacher():
    return affinities(logits_between(TEACHER_IMAGES, TEACHER_TEXTS, TEACHER_SCALE))


def test_info_nce_is_the_mean_of_both_directions_written_out():
    z = [[SCALE * sum(a * b for a, b in zip(i, t)) for t in TEXTS.tolist()] for i in IMAGES.tolist()]
    rows = [-z[k][k] + math.log(sum(math.exp(v) for v in z[k])) for k in range(7)]
    columns = [-z[k][k] + math.log(sum(math.exp(row[k]) for row in z)) for k in range(7)]
    logits = logits_between(IMAGES, TEXTS, SCALE)
    assert info_nce(logits).item() == pytest.approx((sum(rows) + sum(columns)) / 14, rel=1e-12)
    assert info_nce(logits).item() == pytest.approx(ClipLoss()(IMAGES, TEXTS, SCALE).item(), rel=1e-12)


def test_equal_logits_cost_log_n():
    assert info_nce(torch.full((7, 7), 2.5)).item() == pytest.approx(math.log(7), rel=1e-6)


def test_pairs_with_the_same_text_get_the_gradient_of_a_shared_target():
    texts = torch.cat([TEXTS[:3], TEXTS[:3]])  # each text twice
    images = IMAGES[:6].clone().requires_grad_()
    info_nce(logits_between(images, texts, SCALE)).backward()
    shared = IMAGES[:6].clone().requires_grad_()
    z = logits_between(shared, texts, SCALE)
    target = (torch.eye(3, dtype=z.dtype).repeat(2, 2)) / 2
    loss = -(target * z.log_softmax(1)).sum(1).mean() / 2 - (target * z.T.log_softmax(1)).sum(1).mean() / 2
    loss.backward()
    torch.testing.assert_close(images.grad, shared.grad)


def test_sigmoid_loss_is_open_clips():
    bias = -1.3
    ours = sigmoid_loss(logits_between(IMAGES, TEXTS, SCALE) + bias)
    assert ours.item() == pytest.approx(SigLipLoss()(IMAGES, TEXTS, SCALE, bias).item(), rel=1e-6)


def test_logits_are_in_full_precision_under_autocast():
    images, texts = IMAGES.float(), TEXTS.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = logits_between(images, texts, 100.0)
    torch.testing.assert_close(logits, logits_between(IMAGES, TEXTS, 100.0).float(), atol=1e-4, rtol=0)


def test_affinity_distillation_is_open_clips_cross_entropy_less_the_teachers_entropy():
    _, theirs = DistillClipLoss()(IMAGES, TEXTS, SCALE, TEACHER_IMAGES, TEACHER_TEXTS, TEACHER_SCALE)
    to_texts, to_images = teacher()
    entropy = (torch.special.entr(to_texts).sum(1).mean() + torch.special.entr(to_images).sum(1).mean()) / 2
    ours = affinity_distillation(logits_between(IMAGES, TEXTS, SCALE), to_texts, to_images)
    assert ours.item() == pytest.approx((theirs - entropy).item(), rel=1e-10)


def test_a_teacher_that_is_the_student_costs_nothing_and_moves_nothing():
    logits = logits_between(IMAGES, TEXTS, SCALE).requires_grad_()
    loss = affinity_distillation(logits, *affinities(logits.detach()))
    loss.backward()
    assert abs(loss.item()) < 1e-12 and logits.grad.abs().max() < 1e-12


def test_affinities_know_nothing_of_width_and_rotation():
    wide = F.pad(IMAGES, (0, 4)), F.pad(TEXTS, (0, 4))
    rotation = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0]
    turned = affinities(logits_between(wide[0] @ rotation, wide[1] @ rotation, SCALE))
    assert affinity_distillation(logits_between(IMAGES, TEXTS, SCALE), *turned).item() == pytest.approx(0, abs=1e-12)


def test_losses_do_not_depend_on_the_order_of_a_batch():
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    logits, (to_texts, to_images) = logits_between(IMAGES, TEXTS, SCALE), teacher()
    mixed = logits[order][:, order]
    assert info_nce(mixed).item() == pytest.approx(info_nce(logits).item(), rel=1e-12)
    assert sigmoid_loss(mixed).item() == pytest.approx(sigmoid_loss(logits).item(), rel=1e-12)
    again = affinity_distillation(mixed, to_texts[order][:, order], to_images[order][:, order])
    assert again.item() == pytest.approx(affinity_distillation(logits, to_texts, to_images).item(), rel=1e-12)


def test_weights_choose_the_pairs_that_count():
    logits, (to_texts, to_images) = logits_between(IMAGES, TEXTS, SCALE), teacher()
    each = [
        affinity_distillation(logits, to_texts, to_images, F.one_hot(torch.tensor(k), 7).double()).item()
        for k in range(7)
    ]
    assert affinity_distillation(logits, to_texts, to_images).item() == pytest.approx(sum(each) / 7, rel=1e-12)
    some = torch.tensor([1.0, 0, 0, 3, 0, 0, 0], dtype=torch.float64)
    ours = affinity_distillation(logits, to_texts, to_images, some).item()
    assert ours == pytest.approx((each[0] + 3 * each[3]) / 4, rel=1e-12)
    assert affinity_distillation(logits, to_texts, to_images, torch.zeros(7)).item() == 0


def test_interactive_loss_with_oneself_is_the_contrastive_loss():
    ours = interactive_info_nce(IMAGES, TEXTS, IMAGES, TEXTS, SCALE)
    assert ours.item() == pytest.approx(info_nce(logits_between(IMAGES, TEXTS, SCALE)).item(), rel=1e-12)
    theirs = unit(7, 5, 8), unit(7, 5, 9)
    total = 0.0
    for queries, candidates in ((IMAGES, theirs[1]), (TEXTS, theirs[0])):
        for k in range(7):
            z = SCALE * candidates @ queries[k]
            total += (z.exp().sum().log() - z[k]).item() / 14
    assert interactive_info_nce(IMAGES, TEXTS, *theirs, SCALE).item() == pytest.approx(total, rel=1e-12)


def test_the_scale_stays_in_bounds():
    for before, after in ((math.log(500), math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        scale = torch.nn.Parameter(torch.tensor(before))
        clamp_scale(scale)
        assert scale.item() == pytest.approx(after, rel=1e-6) and scale.requires_grad


TWO = """
import os, sys, torch, torch.distributed as dist, torch.nn.functional as F
from fdl.losses.contrastive import gathered_info_nce
rank, place = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
data = torch.load(f"{place}/data.pt")
layer, scale = data["layer"].requires_grad_(), data["scale"].requires_grad_()
mine = slice(4 * rank, 4 * rank + 4)
images, texts = (F.normalize(data[key][mine] @ layer, dim=1) for key in ("images", "texts"))
loss = gathered_info_nce(images, texts, scale)
loss.backward()
torch.save({"loss": loss.detach(), "layer": layer.grad, "scale": scale.grad}, f"{place}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads now and then abort an interpreter that ends in its own time
"""


def test_two_processes_see_the_loss_and_gradient_of_the_whole_batch(tmp_path):
    draw = torch.Generator().manual_seed(0)
    data = {key: torch.randn(8, 6, generator=draw, dtype=torch.float64) for key in ("images", "texts")}
    data |= {"layer": torch.randn(6, 5, generator=draw, dtype=torch.float64), "scale": torch.tensor(4.0).double()}
    torch.save(data, tmp_path / "data.pt")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([sys.executable, "-c", TWO, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    layer, scale = data["layer"].requires_grad_(), data["scale"].requires_grad_()
    images, texts = (F.normalize(data[key] @ layer, dim=1) for key in ("images", "texts"))
    whole = info_nce(logits_between(images, texts, scale))
    whole.backward()
    # DDP takes the mean of the ranks' gradients
    for key, expected in (("loss", whole.detach()), ("layer", layer.grad), ("scale", scale.grad)):
        torch.testing.assert_close((found[0][key] + found[1][key]) / 2, expected)
    assert found[0]["loss"] != found[1]["loss"]
