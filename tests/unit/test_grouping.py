"""Padded batches to groups and back."""

import pytest
import torch

from revisual_fast.integrations.grouping import Images, content_hashes, group_rows, scatter

P, A = [7, 8, 9], [5, 6]


def padded(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Prompts padded on the left, completions on the right, with 0."""
    width, length = (max(len(row[i]) for row in rows) for i in range(2))
    ids = [[0] * (width - len(p)) + p + c + [0] * (length - len(c)) for p, c in rows]
    mask = [[0] * (width - len(p)) + [1] * len(p + c) + [0] * (length - len(c)) for p, c in rows]
    return torch.tensor(ids), torch.tensor(mask), length


def test_equal_prompts_become_one_group_wherever_they_stand():
    made = group_rows(*padded([(P, [1, 2]), (A, [3]), (P, [4, 5, 6]), (A, []), (A, [2, 2])]))
    assert made.rows == [[0, 2], [1, 4]]
    assert [g.prompt.ids.tolist() for g in made.groups] == [P, A]
    assert [c.tolist() for g in made.groups for c in g.completions] == [[1, 2], [4, 5, 6], [3], [2, 2]]
    assert made.index([2, 1]).tolist() == [6, 7, 8, 3]
    assert made.index([]).tolist() == []
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    put = scatter(values, made.index([2, 1]), made.shape)
    assert put.tolist() == [[0, 0, 0], [4, 0, 0], [1, 2, 3], [0, 0, 0], [0, 0, 0]]
    put.backward(torch.arange(15.0).view(5, 3))
    assert values.grad.tolist() == [6, 7, 8, 3]


def test_a_padding_id_inside_a_prompt_is_kept():
    made = group_rows(*padded([([0, 7], [1]), ([7], [1])]))
    assert made.rows == [[0], [1]]


def test_images_tell_prompts_apart():
    pixels = [torch.randn(n, 12) for n in (4, 8, 4)]
    grids = [(1, 2, 2), (1, 2, 4), (1, 2, 2)]
    rows = [(0, 1), (0, 1), (2, 1), (), (0, 1)]
    images = Images(
        torch.cat([pixels[i] for row in rows for i in row]),
        torch.tensor([grids[i] for row in rows for i in row]),
        [len(row) for row in rows],
    )
    made = group_rows(*padded([(P, [1])] * 5), images)
    assert made.rows == [[0, 1, 4], [2], [3]]
    first, second, third = (g.prompt for g in made.groups)
    assert first.image_keys[1] == second.image_keys[1]
    assert first.image_keys[0] != second.image_keys[0]
    assert torch.equal(second.pixel_values, torch.cat([pixels[2], pixels[1]]))
    assert second.grids.tolist() == [[1, 2, 2], [1, 2, 4]]
    assert third.pixel_values is None
    assert third.image_keys == ()


def test_what_does_not_agree_is_refused():
    with pytest.raises(ValueError, match="row 1 has no prompt"):
        group_rows(*padded([(P, [1]), ([], [1])]))
    batch = padded([(P, [1])])
    with pytest.raises(ValueError, match="images do not agree: 1 rows with 2 images"):
        group_rows(*batch, Images(torch.randn(4, 12), torch.tensor([[1, 2, 2]]), [2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_hashes(dtype):
    x = (torch.rand(97, 130) * 250).to(dtype)
    changed, swapped = x.clone(), x.clone()
    changed[96, 129] = 251
    swapped[0, 0], swapped[50, 3] = 1, 2
    again = swapped.clone()
    again[0, 0], again[50, 3] = 2, 1
    a, b, c, d, e = content_hashes([x, x.clone(), changed, swapped, again])
    assert a == b
    assert len({a, c, d, e}) == 4
    assert all(len(h) == 32 for h in (a, c))
    assert content_hashes([]) == []
