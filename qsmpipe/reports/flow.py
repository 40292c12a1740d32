"""A drawing of a plan: which steps follow from which, as SVG for a page."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import networkx as nx
from markupsafe import Markup

from qsmpipe.records import Planned

WIDTH, HEIGHT = 130, 38
"""Size of a step's box (px); a long text widens it."""

LETTER, MARGIN = 7.5, 14
"""Width of a letter, and of the space beside a text (px)."""

GAP, RISE = 18, 24
"""Space between the boxes of a layer, and between layers (px)."""

NARROW = 14
"""Width that a line takes where it passes a layer (px)."""

Place = tuple[float, float]


def draw(plan: Sequence[Planned], states: Mapping[str, str], ident: str) -> Markup:
    """Draw a plan from the top down.

    A line that follows from others is left out: the text below the drawing has them all.

    Parameters
    ----------
    plan : sequence of Planned
        The steps.
    states : mapping
        Name of a step to what became of it: ``done``, ``failed`` or ``not run``.
    ident : str
        Begins the ids of the drawing's title and description.

    Returns
    -------
    svg : Markup
        With a title and a description for those who do not see it.
    """
    graph = _graph(plan)
    # networkx gives the edges that stay in an order that changes from process to process.
    kept = nx.transitive_reduction(graph).edges
    graph.remove_edges_from([edge for edge in graph.edges if edge not in kept])
    texts = {name: ("", name) for name in graph} | {s.name: (s.stage, _short(s)) for s in plan}
    widths = {
        name: max(WIDTH, MARGIN + LETTER * max(map(len, words))) for name, words in texts.items()
    }
    places, size = _placed(_layers(graph), widths)
    lines = [_line(path, places) for path in _paths(graph, places)]
    boxes = [
        _box(*texts[name], states.get(name, ""), places[name], widths[name]) for name in graph
    ]
    text = " ".join(sentence(step) for step in plan)
    return Markup(
        '<svg class="flow" role="img" aria-labelledby="{id}-t {id}-d" '
        'viewBox="0 0 {w:.0f} {h:.0f}" width="{w:.0f}" height="{h:.0f}">'
        '<title id="{id}-t">Steps, and which follow from which</title>'
        '<desc id="{id}-d">{text}</desc>{lines}{boxes}</svg>'
    ).format(
        id=ident, w=size[0], h=size[1], text=text, lines=Markup("").join(lines),
        boxes=Markup("").join(boxes),
    )  # fmt: skip


def sentence(step: Planned) -> str:
    """Say what a step takes from where.

    >>> sentence(Planned("mask bet", "mask", "bet", {"magnitude": ("phase prepare",)}))
    'mask bet takes magnitude of phase prepare.'
    """
    return f"{step.name} takes {step.told or 'the images'}."


def _graph(plan: Sequence[Planned]) -> nx.DiGraph:
    graph = nx.DiGraph()
    for step in plan:
        graph.add_node(step.name)
        for sources in step.takes.values():
            graph.add_edges_from((source, step.name) for source in sources)
    return graph


def _layers(graph: nx.DiGraph) -> list[list[object]]:
    """Put steps into layers, and into each layer that a line passes a place for the line.

    Within a layer all stand in the order of what they follow from.
    """
    layer = {
        name: n for n, names in enumerate(nx.topological_generations(graph)) for name in names
    }
    full = nx.DiGraph()
    full.add_nodes_from(graph)
    for source, target in graph.edges:
        nx.add_path(full, _through(source, target, layer))
    layers: list[list[object]] = [[] for _ in range(1 + max(layer.values(), default=-1))]
    for node in full:
        layers[node[2] if isinstance(node, tuple) else layer[node]].append(node)
    for above, here in pairwise(layers):
        rank = {node: place / max(1, len(above)) for place, node in enumerate(above)}
        before = {
            node: [rank[source] for source in full.predecessors(node) if source in rank]
            for node in here
        }
        here.sort(key=lambda node: sum(before[node]) / max(1, len(before[node])))
    return layers


def _through(source: str, target: str, layer: Mapping[str, int]) -> list[object]:
    """List what a line passes: its ends, and one place in each layer between them."""
    between = range(layer[source] + 1, layer[target])
    return [source, *((source, target, n) for n in between), target]


def _placed(
    layers: Sequence[Sequence[object]], widths: Mapping[str, float]
) -> tuple[dict[object, Place], Place]:
    """Centre of each box and of each place of a line (px), and the size of the whole."""

    def width(node: object) -> float:
        return widths[node] if isinstance(node, str) else NARROW

    spans = [sum(map(width, layer)) + GAP * (len(layer) - 1) for layer in layers]
    total = max(spans, default=0) + 2
    places = {}
    for n, (layer, span) in enumerate(zip(layers, spans, strict=True)):
        x = (total - span) / 2
        for node in layer:
            places[node] = (x + width(node) / 2, 1 + HEIGHT / 2 + n * (HEIGHT + RISE))
            x += width(node) + GAP
    return places, (total, max(0, len(layers) * (HEIGHT + RISE) - RISE) + 2)


def _paths(graph: nx.DiGraph, places: Mapping[object, Place]) -> list[list[object]]:
    passed: dict[tuple[str, str], list[tuple[str, str, int]]] = {}
    for node in places:
        if isinstance(node, tuple):
            passed.setdefault(node[:2], []).append(node)
    return [[a, *sorted(passed.get((a, b), [])), b] for a, b in graph.edges]


def _line(path: Sequence[object], places: Mapping[object, Place]) -> Markup:
    x, y = places[path[0]]
    words = [f"M{x:.1f} {y + HEIGHT / 2:.1f}"]
    for here, node in pairwise(path):
        (x0, y0), (x1, y1) = places[here], places[node]
        top, bottom = y0 + HEIGHT / 2, y1 - HEIGHT / 2
        middle = (top + bottom) / 2
        words.append(f"C{x0:.1f} {middle:.1f} {x1:.1f} {middle:.1f} {x1:.1f} {bottom:.1f}")
        if node is not path[-1]:
            words.append(f"V{y1 + HEIGHT / 2:.1f}")
    return Markup('<path d="{}"/>').format(" ".join(words))


def _box(stage: str, text: str, state: str, place: Place, width: float) -> Markup:
    x, y = place
    return Markup(
        '<g class="{state}">'
        '<rect x="{left:.1f}" y="{top:.1f}" width="{w:.1f}" height="{h}" rx="7"/>'
        '<text x="{x:.1f}" y="{first:.1f}" class="stage">{stage}</text>'
        '<text x="{x:.1f}" y="{second:.1f}">{text}</text></g>'
    ).format(
        state=state.replace(" ", "-"), left=x - width / 2, top=y - HEIGHT / 2, w=width, h=HEIGHT,
        x=x, first=y - 4, second=y + 12, stage=stage, text=text,
    )  # fmt: skip


def _short(step: Planned) -> str:
    """Name a step without its stage, which stands above it.

    >>> _short(Planned("background_vsharp_reliable vsharp", "background", "vsharp"))
    'vsharp reliable'
    >>> _short(Planned("phase offset mcpc3ds", "offset", "mcpc3ds"))
    'mcpc3ds'
    """
    words = step.name.split()
    if step.stage in words[:-1]:
        words = words[words.index(step.stage) + 1 :]
    words[0] = words[0].removeprefix(f"{step.stage}_")
    if len(words) > 1 and words[-1] in words[-2].split("_"):
        del words[-1]
    return " ".join(words).replace("_", " ")
