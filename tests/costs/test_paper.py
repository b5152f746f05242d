"""The papers' accounting, against numbers worked out by hand."""

import pytest

from thintune.costs.paper import METHODS, PaperLayer, paper_account

BATCH, TOKENS, IN, OUT = 4, 5, 6, 7
M = BATCH * TOKENS


def layer(**ranks):
    return PaperLayer((BATCH, TOKENS, IN), OUT, **ranks)


def test_dense_is_weights_inputs_and_three_products():
    found = paper_account("dense", [layer(), layer()])
    assert (found.weight_bytes, found.activation_bytes) == (2 * 4 * OUT * IN, 2 * 4 * M * IN)
    assert found.training_flops == 2 * 3 * 2 * M * IN * OUT
    assert found.memory_bytes == found.weight_bytes + found.activation_bytes
    assert paper_account("galore", [layer(), layer()]) == found


def test_lora_adds_to_the_dense_weight_and_saves_its_gradient_product():
    found = paper_account("lora", [layer(rank=2)])
    assert found.weight_bytes == 4 * (OUT * IN + 2 * (OUT + IN))
    assert found.activation_bytes == 4 * (M * IN + M * 2)
    assert found.training_flops == 2 * 2 * M * IN * OUT + 3 * 2 * M * 2 * (IN + OUT)


def test_wasi_keeps_factors_and_a_tucker_form():
    ranks = (2, 3, 2)
    wasi = paper_account("wasi", [layer(rank=3, activation_ranks=ranks)])
    assert wasi.weight_bytes == 4 * 3 * (OUT + IN)
    assert wasi.activation_bytes == 4 * (2 * 3 * 2 + BATCH * 2 + TOKENS * 3 + IN * 2)
    wsi = paper_account("wsi", [layer(rank=3)])
    assert (wsi.weight_bytes, wsi.activation_bytes) == (wasi.weight_bytes, 4 * M * IN)
    asi = paper_account("asi", [layer(activation_ranks=ranks)])
    assert (asi.weight_bytes, asi.activation_bytes) == (4 * OUT * IN, wasi.activation_bytes)
    assert wasi.training_flops > 0 and asi.training_flops > 0
    assert wsi.training_flops == 2 * M * 3 * (2 * (IN + OUT) + 2 * IN + OUT)


def test_thin_counts_its_update_and_basis_too():
    found = paper_account("thin", [layer(rank=3, activation_ranks=(2,))])
    assert found.weight_bytes == 4 * (3 + 2) * (OUT + IN)
    assert found.activation_bytes == 4 * M * 2
    assert found.training_flops == 2 * M * (2 * 3 * (IN + OUT) + 2 * IN + 2 * OUT)


def test_the_published_ratio_comes_from_leaving_everything_else_out():
    """ViT-B/16 at batch 128, the two linears of an MLP, small Tucker ranks: tens of times less on paper."""
    shapes = [((128, 197, 768), 3072), ((128, 197, 3072), 768)]
    dense = paper_account("dense", [PaperLayer(s, o) for s, o in shapes])
    wasi = paper_account("wasi", [PaperLayer(s, o, rank=300, activation_ranks=(60, 30, 40)) for s, o in shapes])
    assert dense.memory_bytes > 30 * wasi.memory_bytes


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_rank_or_an_unknown_method_is_an_error(method):
    assert paper_account(method, []).memory_bytes == 0
    if method not in ("dense", "galore"):
        with pytest.raises(ValueError, match="rank"):
            paper_account(method, [layer()])
    with pytest.raises(ValueError, match="expected one of dense"):
        paper_account("qlora", [])
