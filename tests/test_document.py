"""Section 3 of the specification, its equations written out a second time on a plain ViT, against the options that
follow them. docs/options.md has the table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tuner_cases import images, tiny

from peft_cl import CodaPromptConfig, DualPromptConfig, L2PConfig


BATCH = 6


def model_and_plain(config):
    """A model with noise in all that it trains, in training, and the plain ViT that it prompts."""
    torch.manual_seed(0)
    model = get_peft_model(tiny(), config)
    model.begin_task(["a", "b", "c"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.train(), tiny().vit.eval(), model.base_model.pool, model.base_model.head.active


def cls_feature(vit, tokens, place):
    for layer in vit.layers:
        tokens = layer(tokens)
    return vit.layernorm(tokens)[:, place]


def check(model, logits, terms):
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    output = model(pixel_values=images(BATCH), labels=labels)
    torch.testing.assert_close(output.logits, logits, atol=2e-6, rtol=1e-4)
    parts = model.base_model.head.last_losses
    for name, value in terms.items():
        torch.testing.assert_close(parts[name], value.detach(), atol=1e-5, rtol=1e-5)
    total = F.cross_entropy(logits, labels) + sum(terms.values())
    torch.testing.assert_close(output.loss, total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("pull", "scale"), [("squared_distance", 1), ("mean_squared_distance", 24)])
def test_l2p(pull, scale):
    """q = W f + b, cosines, top-k, [P; x], W_cls h_CLS; pull = 1/k sum |q - K|^2 (section 3), its mean over D (5)."""
    config = L2PConfig.from_preset(
        "textbook", pool_size=5, prompt_length=3, top_k=2, query_projection="linear", pull_form=pull
    )
    model, vit, pool, head = model_and_plain(config)
    tokens = vit.embeddings(images(BATCH))
    with torch.no_grad():
        feature = cls_feature(vit, tokens, 0)
    query = feature @ pool.query_projection.weight.T + pool.query_projection.bias
    keys = pool.keys[0]
    scores = (query / query.norm(dim=1, keepdim=True)) @ (keys / keys.norm(dim=1, keepdim=True)).T
    logits, distance = [], 0.0
    for sample in range(BATCH):
        rows = scores[sample].argsort(descending=True)[:2]
        prompts = torch.cat([pool.prompts[0, row] for row in rows])
        hidden = cls_feature(vit, torch.cat([prompts[None], tokens[sample : sample + 1]], 1), 6)
        logits.append(hidden @ head.weight.T + head.bias)
        distance = distance + sum(((query[sample] - keys[row]) ** 2).sum() for row in rows) / 2 / BATCH
    check(model, torch.cat(logits), {"pull": distance / scale})


def test_dualprompt():
    """i* = argmax q' K_i over a pool that tasks share, in training; [P_G; P_E; x]; + |cov(H_G, H_E)|^2 (errata 2)."""
    config = DualPromptConfig.from_preset(
        "textbook",
        pool_size=4,
        prompt_length=3,
        g_prompt_length=2,
        similarity="dot",
        query_projection=None,
        separation_coefficient=0.2,
        pull_coefficient=0.0,
    )
    model, vit, pool, head = model_and_plain(config)
    tokens = vit.embeddings(images(BATCH))
    with torch.no_grad():
        query = cls_feature(vit, tokens, 0)
    expert = (query @ pool.keys[0].T).argmax(1)
    general = pool.g_prompts[0, 0].expand(BATCH, -1, -1)
    chosen = torch.stack([pool.prompts[0, 0, row] for row in expert])
    hidden = cls_feature(vit, torch.cat([general, chosen, tokens], 1), 5)
    alone = [cls_feature(vit, torch.cat([part, tokens], 1), part.shape[1]) for part in (general, chosen)]
    centred = [each - each.mean(0) for each in alone]
    covariance = sum(torch.outer(*(each[sample] for each in centred)) for sample in range(BATCH)) / (BATCH - 1)
    terms = {"separation": 0.2 * (covariance**2).sum(), "pull": torch.zeros(())}
    check(model, hidden @ head.weight.T + head.bias, terms)
    assert expert.unique().numel() > 1


def test_coda():
    """q = mean of the layer's patches, i* = argmax q' K_i, prompts before each layer and taken out after it; sum over
    layers of |P_i' P_j|, i != j; minus the entropy of the mean selection, summed over layers (errata 4)."""
    config = CodaPromptConfig.from_preset(
        "textbook",
        pool_size=4,
        prompt_length=3,
        similarity="dot",
        query_source="layer_patches",
        orthogonality="products",
        orthogonality_coefficient=0.01,
        entropy_coefficient=0.1 * 3,  # the library averages over the 3 layers
    )
    model, vit, pool, head = model_and_plain(config)
    tokens = vit.embeddings(images(BATCH))
    products, entropy = 0.0, 0.0
    for number, layer in enumerate(vit.layers):
        prompts, keys = pool.prompts[number], pool.keys[number]
        scores = tokens[:, 1:].mean(1) @ keys.T
        chosen = torch.stack([prompts[row] for row in scores.argmax(1)])
        tokens = layer(torch.cat([chosen, tokens], 1))[:, 3:]
        rows = prompts.flatten(1)
        products = products + sum((rows[i] @ rows[j]).abs() for i in range(4) for j in range(4) if i != j)
        mean = scores.softmax(1).mean(0)
        entropy = entropy - (mean * mean.log()).sum()
    logits = vit.layernorm(tokens)[:, 0] @ head.weight.T + head.bias
    check(model, logits, {"orthogonality": 0.01 * products, "entropy": -0.1 * entropy})


def test_coda_shares_its_pool_among_all_tasks():
    """Every task trains the same N prompts: N L K d numbers, however many tasks there are."""
    config = CodaPromptConfig.from_preset("textbook", pool_size=4, prompt_length=3)
    model, _, pool, _ = model_and_plain(config)
    for task in range(3):
        if task:
            model.begin_task([f"{task} a", f"{task} b"])
        assert pool.prompts.shape == (3, 4, 3, 24) and pool.rows_in_use == 4
        labels = torch.tensor(model.peft_config["default"].tasks[-1])[torch.arange(BATCH) % 2]
        model(pixel_values=images(BATCH, seed=task), labels=labels).loss.backward()
        moved = pool.prompts.grad.abs().sum(dim=(2, 3)) > 0
        assert moved.all()  # those that no image chose by orthogonality
        pool.prompts.grad = None


def test_section_2_sums_the_products_of_all_rows_with_sign():
    config = CodaPromptConfig.from_preset(
        "textbook",
        pool_size=4,
        prompt_length=3,
        orthogonality="signed",
        orthogonality_coefficient=0.1,
        entropy_coefficient=0,
    )
    model, _, pool, _ = model_and_plain(config)
    rows = pool.prompts.flatten(2)
    expected = sum(rows[layer, i] @ rows[layer, j] for layer in range(3) for i in range(4) for j in range(4))
    model(pixel_values=images(BATCH), labels=torch.zeros(BATCH, dtype=torch.long))
    torch.testing.assert_close(model.base_model.head.last_losses["orthogonality"], 0.1 * expected.detach())


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (L2PConfig.from_preset("textbook", pool_size=20, prompt_length=5), 20 * 5 * 24),
        (DualPromptConfig.from_preset("textbook", pool_size=10), (5 + 10 * 5) * 24),
        (CodaPromptConfig.from_preset("textbook", pool_size=10, prompt_length=5), 3 * 10 * 5 * 24),
    ],
)
def test_numbers_of_prompts_after_any_number_of_tasks(config, count):
    """Section 3's counts, N L d, (L_G + N L_E) d and L N K d, here with a width of 24 and three layers."""
    model = get_peft_model(tiny(), config)
    for task in range(3):
        model.begin_task([f"class {task}"])
        pool = model.base_model.pool
        assert sum(value.numel() for name, value in pool.state_dict().items() if "prompts" in name) == count
