"""Charts: what is written on them can be read."""

from __future__ import annotations

from itertools import combinations

from motionmerge.evaluation.figures import label_points, new_figure, to_svg


def test_labels_of_points_at_one_place_do_not_lie_upon_each_other():
    figure, axes = new_figure(6.4, 4.4)
    points = [(1.0, 28.5 + 0.01 * number, f"{number} (97 %)") for number in range(12)]
    points.append((0.9, 11.0, "alone"))
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o")
    label_points(axes, points, figure=figure)
    texts = [one for one in axes.texts if one.get_text()]
    assert [one.get_text() for one in texts] == [text for _, _, text in points]
    figure.draw_without_rendering()
    boxes = [one.get_window_extent() for one in texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
    assert all(f">{text}<" in to_svg(figure) for _, _, text in points)
