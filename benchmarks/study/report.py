"""The tables and pictures of the evidence pages in `docs/`, from the study's results."""

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

# In the curves: method to colour.
SHOWN = {
    "equal": "0.5",
    "DWA, T = 2": "#0072B2",
    "DWA, T = 0.5": "#56B4E9",
    "random": "#D55E00",
    "static, tuned": "#009E73",
    "adapt": "#CC79A7",
}
# In the picture of weights.
DRAWN = "DWA, T = 2"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def table(columns, rows):
    """In Markdown."""
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def interval(differences):
    """That of 95% of their mean, by bootstrap."""
    resampled = stats.bootstrap((differences,), np.mean, method="percentile", rng=0)
    return resampled.confidence_interval


class Comparison:
    """By how many percentage points a method's gain is above that of equal weights.

    Paired by seed; each of the epoch that is best on validation, both gains on test.

    Attributes:
        mean: over the seeds.
        low, high: its interval.
        p: of the exact test that flips the signs of the seeds' differences.
    """

    def __init__(self, results, method):
        gains = [results.at_best(name, results.gains(name, "test")) for name in (method, "equal")]
        differences = np.subtract(*gains)
        self.mean = differences.mean()
        self.low, self.high = interval(differences)
        flipped = stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        self.p = flipped.pvalue


def comparisons(all_results):
    """Family to method to `Comparison`, and the p-values corrected for all of them."""
    found = {
        family: {name: Comparison(results, name) for name in methods(results) if name != "equal"}
        for family, results in all_results.items()
    }
    flat = [comparison for of_family in found.values() for comparison in of_family.values()]
    corrected = stats.false_discovery_control([comparison.p for comparison in flat])
    for comparison, p in zip(flat, corrected, strict=True):
        comparison.corrected = p
    return found


def methods(results):
    """Those that train all tasks, in the order in which they were trained."""
    names = dict.fromkeys(method for method, _ in results.runs)
    return [n for n in names if not n.startswith(("rate", "drawn")) and not n.endswith("alone")]


def shown(one, with_interval):
    """A comparison, in bold if its corrected p-value is below 5%."""
    text = f"{one.mean:+.1f}"
    if with_interval:
        text += f" ({one.low:+.1f} to {one.high:+.1f})"
    return f"**{text}**" if one.corrected < 0.05 else text


def difference_table(found, with_interval=True):
    names = dict.fromkeys(name for of_family in found.values() for name in of_family)
    rows = [
        [name, *(shown(of[name], with_interval) if name in of else "-" for of in found.values())]
        for name in names
    ]
    return table(["against equal weights", *found], rows)


def rank_table(all_results):
    ranks = [results.ranks(methods(results), "test") for results in all_results.values()]
    names = dict.fromkeys(name for of_family in ranks for name in of_family)
    rows = [[n, *(f"{of[n]:.1f}" if n in of else "-" for of in ranks)] for n in names]
    return table(["mean rank", *all_results], rows)


def gain_table(all_results):
    names = dict.fromkeys(name for results in all_results.values() for name in methods(results))

    def cell(results, name):
        if name not in methods(results):
            return "-"
        gains = results.at_best(name, results.gains(name, "test"))
        return f"{gains.mean():+.1f} ± {gains.std(ddof=1):.1f}"

    rows = [[name, *(cell(results, name) for results in all_results.values())] for name in names]
    return table(["against each task alone", *all_results], rows)


def backend_table(backends):
    """Gains over each task alone, and the differences to equal weights, on each backend."""
    rows = []
    of_all = set.intersection(*(set(methods(results)) for results in backends.values()))
    for backend, results in backends.items():
        for name in filter(of_all.__contains__, methods(results)):
            gains = results.at_best(name, results.gains(name, "test"))
            row = [backend, name, f"{gains.mean():+.1f} ± {gains.std(ddof=1):.1f}", "-"]
            if name != "equal":
                one = Comparison(results, name)
                row[-1] = f"{one.mean:+.1f} ({one.low:+.1f} to {one.high:+.1f})"
            rows.append(row)
    return table(["backend", "weights", "against each task alone", "against equal weights"], rows)


def metric_table(results):
    rows = []
    for name in methods(results):
        cells = []
        for metric in results.family.metric_names:
            values, of_equal = (
                results.at_best(each, results.column(each, f"{metric}: test"))
                for each in (name, "equal")
            )
            if name == "equal":
                cells.append(f"{values.mean():.4g} ± {values.std(ddof=1):.2g}")
            else:
                low, high = interval(values - of_equal)
                cells.append(f"{values.mean():.4g} ({low:+.2g} to {high:+.2g})")
        rows.append([name, *cells, f"{results.best(name).mean() + 1:.0f}"])
    if results.family.judged == results.family.tasks:
        alone = results.references("test").values()
        rows.append(["each task alone", *(f"{value:.4g}" for value in alone), "-"])
    return table(["", *results.family.metric_names, "best epoch"], rows)


def draw(families, draw_panel):
    """A figure with a panel for each family, which `draw_panel(panel, of_family)` fills."""
    rows = -(-len(families) // 2)
    figure = Figure((8.5, 2 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).flat
    for (name, of_family), panel in zip(families.items(), panels, strict=False):
        panel.set_title(name)
        panel.grid(alpha=0.3)
        draw_panel(panel, of_family)
    for empty in panels:
        empty.remove()
    return figure


def draw_differences(panel, of_family):
    for row, one in enumerate(reversed(of_family.values())):
        colour = "#D55E00" if one.corrected < 0.05 else "0.3"
        panel.plot([one.low, one.high], [row, row], color=colour)
        panel.plot(one.mean, row, "o", color=colour, markersize=4)
    panel.axvline(0, color="0.5", linestyle=":")
    panel.set_yticks(range(len(of_family)), list(reversed(of_family)), fontsize=8)
    panel.set_xlabel("points against equal weights")


def draw_curves(panel, results):
    names = [name for name in SHOWN if name in methods(results)]
    curves = [results.gains(name, "val").mean(axis=0) for name in names]
    for name, gains in zip(names, curves, strict=True):
        panel.plot(1 + np.arange(len(gains)), gains, color=SHOWN[name], label=name)
    # The first epochs are far below all else.
    panel.set_ylim(bottom=1.2 * min(map(np.median, curves)))
    panel.set(xlabel="epoch", ylabel="gain on validation, %")
    panel.legend(fontsize=7)


def draw_weights(panel, results):
    for task, colour in zip(results.family.tasks, COLOURS, strict=False):
        weights = results.column(DRAWN, f"{task}: weight")
        epochs = 1 + np.arange(weights.shape[1])
        panel.plot(epochs, weights.mean(axis=0), color=colour, label=task)
        low, high = weights.min(axis=0), weights.max(axis=0)
        panel.fill_between(epochs, low, high, color=colour, alpha=0.2)
    panel.set(xlabel="epoch", ylabel=f"weight, {DRAWN}")
    panel.legend(fontsize=7)


def write(all_results, backends, pages, pictures):
    """Writes the tables into their places in the pages, and the pictures.

    Args:
        all_results: name to results of each family.
        backends: backend to results of a family there.
        pages: paths. A place begins with `<!-- name -->` and ends with `<!-- end -->`; a page that
            does not exist is made of all of them.
        pictures: the folder of the pictures.
    """
    # In raw units, an error may be a thousand times another: their relative means say nothing.
    comparable = {name: of for name, of in all_results.items() if name != "raw units"}
    found = comparisons(comparable)
    blocks = {"differences": difference_table(found), "gains": gain_table(all_results)}
    blocks |= {"summary": difference_table(found, with_interval=False)}
    blocks |= {"ranks": rank_table(all_results), "backends": backend_table(backends)}
    blocks |= {name: metric_table(results) for name, results in all_results.items()}
    for page in pages:
        if not page.exists():
            page.write_text("\n".join(f"<!-- {name} -->\n<!-- end -->\n" for name in blocks))
        text = page.read_text()
        for name, block in blocks.items():
            before, start, rest = text.partition(f"<!-- {name} -->\n")
            if start:
                text = before + start + block + "\n" + rest[rest.index("<!-- end -->") :]
        page.write_text(text)
    for name, figure in {
        "differences": draw(found, draw_differences),
        "curves": draw(comparable, draw_curves),
        "weights": draw(all_results, draw_weights),
    }.items():
        figure.savefig(pictures / f"evidence_{name}.svg", metadata={"Date": None})
