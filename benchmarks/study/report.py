"""The tables and pictures of `docs/evidence.md`, from the study's results."""

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
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


def table(columns, rows):
    """In Markdown."""
    lines = (columns, ["---"] * len(columns), *rows)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


class Comparison:
    """By how many percentage points a method's gain is above that of equal weights.

    Paired by seed; each of the epoch that is best on validation, both gains on test.

    Attributes:
        mean: over the seeds.
        low, high: the interval of 95% of it, by bootstrap over the seeds.
        p: of the exact test that flips the signs of the seeds' differences.
    """

    def __init__(self, results, method):
        gains = [results.at_best(name, results.gains(name, "test")) for name in (method, "equal")]
        differences = np.subtract(*gains)
        self.mean = differences.mean()
        interval = stats.bootstrap((differences,), np.mean, method="percentile", rng=0)
        self.low, self.high = interval.confidence_interval
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


def difference_table(found):
    names = list(dict.fromkeys(name for of_family in found.values() for name in of_family))
    rows = []
    for name in names:
        cells = []
        for of_family in found.values():
            if one := of_family.get(name):
                text = f"{one.mean:+.1f} ({one.low:+.1f} to {one.high:+.1f})"
                cells.append(f"**{text}**" if one.corrected < 0.05 else text)
            else:
                cells.append("-")
        rows.append([name, *cells])
    return table(["against equal weights", *found], rows)


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
    for backend, results in backends.items():
        for name in methods(results):
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
            values = results.at_best(name, results.column(name, f"{metric}: test"))
            cells.append(f"{values.mean():.4g} ± {values.std(ddof=1):.2g}")
        rows.append([name, *cells, f"{results.best(name).mean() + 1:.0f}"])
    if results.family.judged == results.family.tasks:
        alone = results.references("test").values()
        rows.append(["each task alone", *(f"{value:.4g}" for value in alone), "-"])
    return table(["", *results.family.metric_names, "best epoch"], rows)


def draw_differences(found):
    figure = Figure((10, 2 + 2.4 * len(found) / 2), layout="constrained")
    panels = figure.subplots(-(-len(found) // 2), 2, squeeze=False).flat
    for panel, (family, of_family) in zip(panels, found.items(), strict=False):
        for row, one in enumerate(reversed(of_family.values())):
            colour = "#D55E00" if one.corrected < 0.05 else "0.3"
            panel.plot([one.low, one.high], [row, row], color=colour)
            panel.plot(one.mean, row, "o", color=colour, markersize=4)
        panel.axvline(0, color="0.5", linestyle=":")
        panel.set_yticks(range(len(of_family)), list(reversed(of_family)), fontsize=8)
        panel.set(title=family, xlabel="percentage points against equal weights")
    return figure


def draw_curves(all_results):
    figure = Figure((10, 2 + 2.2 * len(all_results) / 2), layout="constrained")
    panels = figure.subplots(-(-len(all_results) // 2), 2, squeeze=False).flat
    for panel, (family, results) in zip(panels, all_results.items(), strict=False):
        for name, colour in SHOWN.items():
            if name in methods(results):
                gains = results.gains(name, "val").mean(axis=0)
                panel.plot(1 + np.arange(len(gains)), gains, color=colour, label=name)
        panel.set(title=family, xlabel="epoch", ylabel="gain on validation, %")
        panel.set_ylim(bottom=np.percentile(results.gains("equal", "val").mean(axis=0), 15))
        panel.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def draw_weights(all_results, method="DWA, T = 2"):
    figure = Figure((10, 2 + 2.2 * len(all_results) / 2), layout="constrained")
    panels = figure.subplots(-(-len(all_results) // 2), 2, squeeze=False).flat
    for panel, (family, results) in zip(panels, all_results.items(), strict=False):
        for task, colour in zip(results.family.tasks, COLOURS, strict=False):
            weights = results.column(method, f"{task}: weight")
            epochs = 1 + np.arange(weights.shape[1])
            panel.plot(epochs, weights.mean(axis=0), color=colour, label=task)
            panel.fill_between(
                epochs, weights.min(axis=0), weights.max(axis=0), color=colour, alpha=0.2
            )
        panel.set(title=family, xlabel="epoch", ylabel=f"weight, {method}")
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)
    return figure


def write(all_results, backends, page, pictures):
    """Writes the tables into their places in the page, and the pictures.

    Args:
        all_results: name to results of each family.
        backends: backend to results of the subset.
        page: a path. A place begins with `<!-- name -->` and ends with `<!-- end -->`; a page that
            does not exist is made of all of them.
        pictures: the folder of the pictures.
    """
    found = comparisons(all_results)
    blocks = {"differences": difference_table(found), "gains": gain_table(all_results)}
    blocks["backends"] = backend_table(backends)
    blocks |= {name: metric_table(results) for name, results in all_results.items()}
    if not page.exists():
        page.write_text("\n".join(f"<!-- {name} -->\n<!-- end -->\n" for name in blocks))
    text = page.read_text()
    for name, block in blocks.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        text = before + start + block + "\n" + rest[rest.index("<!-- end -->") :]
    page.write_text(text)
    for name, figure in {
        "differences": draw_differences(found),
        "curves": draw_curves(all_results),
        "weights": draw_weights(all_results),
    }.items():
        figure.savefig(pictures / f"evidence_{name}.png", dpi=90)
