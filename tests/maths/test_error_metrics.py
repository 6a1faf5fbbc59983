import pytest
import torch

from llava_fa.maths import metrics


def test_weight_error():
    W = torch.tensor([[3.0, 4.0]])
    assert metrics.weight_error(W, torch.tensor([[3.0, 3.0]])) == pytest.approx(0.2)
    assert metrics.weight_error(torch.zeros(1, 2), torch.zeros(1, 2)) == 0
    assert metrics.weight_error(torch.zeros(1, 2), W) == float("inf")


def test_output_error_is_that_of_outputs():
    x, W, Q = torch.randn(5000, 8), torch.randn(3, 8), torch.randn(3, 8)
    H = x.T @ x / 5000
    expected = float((x @ (W - Q).T).norm() / (x @ W.T).norm())
    assert metrics.output_error(W, Q, H) == pytest.approx(expected, rel=1e-4)
    diagonal = metrics.output_error(W, Q, H.diagonal())
    assert diagonal == pytest.approx(metrics.output_error(W, Q, torch.diag(H.diagonal())), rel=1e-5)


@pytest.mark.parametrize("shape", [(2500, 4), (7, 1200)])
def test_more_rows_or_columns_than_a_block(shape):
    W, x = torch.randn(shape), torch.randn(50, shape[1])
    H = x.T @ x / 50
    exact = (W.double() @ H.double() * W.double()).sum()
    assert metrics.quadratic(W, H) == pytest.approx(float(exact), rel=1e-5)


def test_stored_bytes_counts_every_byte():
    tensors = [torch.zeros(10, dtype=torch.uint8), torch.zeros(3, dtype=torch.bfloat16), torch.zeros(1)]
    assert metrics.stored_bytes(tensors) == 20
