"""Three tasks for each pixel of rendered scenes: its class, its depth and its surface normal.

    python examples/dense_prediction.py [--attention]

is the setting of Liu, Johns & Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019,
in small: rooms with spheres and boxes, which NumPy renders with exact truths, in the place of
NYUv2. It trains a shared encoder-decoder (with `--attention` and one attention network per task on
top of it, the paper's MTAN) by Dynamic Weight Average and under equal weights. Losses and metrics
are those of the paper's code, https://github.com/lorenmt/mtan. It prints the losses and weights of
each epoch and compares the two on test scenes. It writes a picture of one of these, for which it
needs matplotlib; `--picture ""` writes none. The backend is the one that KERAS_BACKEND names:
tensorflow, jax (if it is unset) or torch.
"""

import argparse
import importlib
import math
import os
from functools import partial

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras import layers, ops

from keras_dwa import DynamicWeightAverage

HEIGHT, WIDTH = 48, 64
CLASSES = ("floor", "side wall", "back wall", "ball", "balloon", "crate", "pillar", "slab")
COLOURS = 0.5 + 0.4 * np.cos(2 * np.pi * np.add.outer(np.arange(8) / 8, np.arange(3) / 3))
# Half the size of boxes in metres, at least and at most.
BOXES = {
    "crate": ((0.3, 0.3, 0.3), (0.5, 0.5, 0.5)),
    "pillar": ((0.12, 0.8, 0.12), (0.25, 1.2, 0.25)),
    "slab": ((0.5, 0.06, 0.4), (0.9, 0.15, 0.7)),
}
# The channels of each task's prediction.
TASKS = {"semantic": len(CLASSES), "depth": 1, "normals": 3}
FILTERS = (16, 32, 64)
BATCH_SIZE = 16


# The scenes. x points right, y up and z backwards, in metres. A ray (x, y, -1) of the camera gets
# as far as its depth when it is multiplied by it. Each `hit_*` returns the depth at which rays
# meet a surface, shape (H, W), inf where they miss it, and its unit normal there, (H, W, 3).


def hit_plane(origin, rays, point, normal, height=np.inf):
    """A plane through `point`, up to `height` above the floor."""
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = (point - origin) @ normal / (rays @ normal)
        is_hit = (depth > 0) & (origin[..., 1] + depth * rays[..., 1] < height)
    return np.where(is_hit, depth, np.inf), np.broadcast_to(normal, rays.shape)


def hit_sphere(origin, rays, centre, radius):
    offset = origin - centre
    a, b = np.sum(rays * rays, axis=-1), np.sum(rays * offset, axis=-1)
    discriminant = b**2 - a * (np.sum(offset * offset, axis=-1) - radius**2)
    depth = (-b - np.sqrt(np.maximum(discriminant, 0))) / a
    normal = (offset + depth[..., None] * rays) / radius
    return np.where((discriminant > 0) & (depth > 0), depth, np.inf), normal


def hit_box(origin, rays, centre, half_size, to_world):
    """A box with sides along the columns of the rotation `to_world`."""
    offset, rays = (origin - centre) @ to_world, rays @ to_world
    rays = np.where(np.abs(rays) < 1e-9, 1e-9, rays)
    enter = (-np.sign(rays) * half_size - offset) / rays
    leave = (np.sign(rays) * half_size - offset) / rays
    depth = enter.max(axis=-1)
    normal = -np.sign(rays) * (enter == depth[..., None])
    is_hit = (depth > 0) & (depth < leave.min(axis=-1))
    return np.where(is_hit, depth, np.inf), normal @ to_world.T


def nearest_hit(surfaces, origin, rays):
    """Depth and normal where each ray first meets a surface, and the index of that surface."""
    hits = [hit(origin, rays) for _, hit in surfaces]
    depths, normals = (np.stack(values) for values in zip(*hits, strict=True))
    index = depths.argmin(axis=0)
    rows, columns = np.indices(index.shape)
    return depths[index, rows, columns], normals[index, rows, columns], index


def rotation(axis, angle):
    """The matrix that turns column vectors by `angle` radians about axis 0, 1 or 2."""
    sine, cosine = np.sin(angle), np.cos(angle)
    matrix = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    return np.roll(matrix, axis + 1, axis=(0, 1))


def random_room(random):
    """A floor, three walls and four to eight objects: a list of (class, hit function)."""
    left, right, back = random.uniform((-3.5, 2.5, -8), (-2.5, 3.5, -6))
    x, y, z = np.eye(3)
    wall = partial(hit_plane, height=random.uniform(1.8, 2.6))
    surfaces = [
        ("floor", partial(hit_plane, point=0 * y, normal=y)),
        ("side wall", partial(wall, point=left * x, normal=x)),
        ("side wall", partial(wall, point=right * x, normal=-x)),
        ("back wall", partial(wall, point=back * z, normal=z)),
    ]
    for name in random.choice(CLASSES[3:], size=random.integers(4, 9)):
        centre = random.uniform((left + 0.5, 1, back + 0.5), (right - 0.5, 2, -2.5))
        if name in BOXES:
            half_size = random.uniform(*BOXES[name])
            centre[1] = half_size[1]
            turned = rotation(1, random.uniform(0, np.pi))
            hit = partial(hit_box, centre=centre, half_size=half_size, to_world=turned)
        else:
            radius = random.uniform(0.25, 0.6)
            if name == "ball":
                centre[1] = radius
            hit = partial(hit_sphere, centre=centre, radius=radius)
        surfaces.append((name, hit))
    return surfaces


def render(random):
    """A random scene: the image (H, W, 3) in [0, 1], and the truth of each task.

    These are labels (H, W), depths (H, W, 1) in metres, and unit normals (H, W, 3) in the camera's
    frame. Where a pixel has none, its label is -1, its depth 0 or its normal 0: above the walls,
    where rays meet nothing, and in the holes that the annotator and the depth sensor leave.
    """
    surfaces = random_room(random)
    yaw, pitch, roll = random.uniform((-0.4, -0.4, -0.1), (0.4, -0.1, 0.1))
    to_world = rotation(1, yaw) @ rotation(0, pitch) @ rotation(2, roll)
    y, x = np.mgrid[0.5:HEIGHT, 0.5:WIDTH]
    x, y = (x - WIDTH / 2) / (0.8 * WIDTH), (HEIGHT / 2 - y) / (0.8 * WIDTH)
    rays = np.stack([x, y, -np.ones_like(x)], axis=-1) @ to_world.T
    camera = np.array([0, random.uniform(1.3, 1.8), 0])
    depth, normal, index = nearest_hit(surfaces, camera, rays)
    is_hit = np.isfinite(depth)
    points = camera + np.where(is_hit, depth, 0)[..., None] * rays

    to_light = random.uniform((-0.6, 0.6, 0.2), (0.6, 1.0, 0.8))
    to_light /= np.linalg.norm(to_light)
    is_lit = np.isinf(nearest_hit(surfaces, points + 1e-3 * normal, to_light + 0 * rays)[0])
    light = 0.6 + 0.5 * is_lit * np.maximum(normal @ to_light, 0)
    period = random.uniform(0.5, 1.0, size=len(surfaces))[index, None]
    chequers = np.sign(np.sin(2 * np.pi * points / period + 1).prod(axis=-1))
    labels = np.array([CLASSES.index(name) for name, _ in surfaces])
    tints = random.uniform(size=(len(surfaces), 3))
    colour = (0.6 * COLOURS[labels] + 0.4 * tints)[index]
    image = colour * (light * (1 + 0.12 * chequers))[..., None]
    image = np.where(is_hit[..., None], image, (0.75, 0.85, 0.95))
    image = np.clip(image + random.normal(scale=0.03, size=image.shape), 0, 1)

    is_labelled, is_sensed = (is_hit & ~holes(random) for _ in range(2))
    return image.astype("float32"), {
        "semantic": np.where(is_labelled, labels[index], -1),
        "depth": np.where(is_sensed, depth, 0)[..., None].astype("float32"),
        "normals": (is_sensed[..., None] * (normal @ to_world)).astype("float32"),
    }


def holes(random):
    """A mask (H, W) of blotches, about one pixel in twenty."""
    return (random.uniform(size=(HEIGHT // 4, WIDTH // 4)) < 0.05).repeat(4, 0).repeat(4, 1)


def random_scenes(count):
    random = np.random.default_rng(0)
    images, truths = zip(*(render(random) for _ in range(count)), strict=True)
    return np.stack(images), {task: np.stack([truth[task] for truth in truths]) for task in TASKS}


# The losses, averaged over those pixels of a batch that have a truth.


def semantic_loss(labels, logits):
    """Cross-entropy of labels (B, H, W) and logits (B, H, W, C)."""
    labels = ops.cast(labels, "int32")
    losses = ops.sparse_categorical_crossentropy(ops.maximum(labels, 0), logits, from_logits=True)
    return mean_where(labels >= 0, losses)


def depth_loss(depths, predictions):
    """L1 distance of depths (B, H, W, 1), in metres."""
    return mean_where(depths > 0, ops.abs(predictions - depths))


def normals_loss(normals, predictions):
    """One minus the dot product of unit normals (B, H, W, 3)."""
    losses = 1 - ops.sum(predictions * normals, axis=-1)
    return mean_where(ops.any(normals != 0, axis=-1), losses)


def mean_where(is_valid, losses):
    is_valid = ops.cast(is_valid, losses.dtype)
    return ops.sum(is_valid * losses) / ops.maximum(ops.sum(is_valid), 1)


LOSSES = {"semantic": semantic_loss, "depth": depth_loss, "normals": normals_loss}


def convolution(filters, size=3, activation="relu"):
    convolve = layers.Conv2D(filters, size, padding="same", use_bias=False)
    # An epoch has few batches: 0.99, the default, would remember those of the first epochs.
    normalize = layers.BatchNormalization(momentum=0.9)
    return keras.Sequential([convolve, normalize, layers.Activation(activation)])


def build_model(attention):
    """The paper's SegNet with fewer and narrower blocks, and its MTAN if `attention` is true.

    SegNet unpools by the indices of its encoder's maxima. Keras has no layer for that: this decoder
    gets the encoder's features instead.
    """
    image = last = keras.Input((HEIGHT, WIDTH, 3))
    encoder, decoder = [], []  # The first and the last features of each block.
    for filters in FILTERS:
        first = convolution(filters)(last)
        encoder.append((first, convolution(filters)(first)))
        last = layers.MaxPooling2D()(encoder[-1][1])
    for filters, (_, skipped) in zip(FILTERS[::-1], encoder[::-1], strict=True):
        first = layers.Concatenate()([layers.UpSampling2D()(last), skipped])
        last = convolution(filters)(first)
        decoder.append((first, last))
    features = attended_features(encoder, decoder) if attention else dict.fromkeys(TASKS, last)
    predictions = {
        task: layers.Conv2D(channels, 1)(convolution(FILTERS[0])(features[task]))
        for task, channels in TASKS.items()
    }
    # Not by Keras's UnitNormalization: on JAX and torch, its gradient is NaN where its input is 0.
    squares = ops.sum(ops.square(predictions["normals"]), axis=-1, keepdims=True)
    predictions["normals"] *= ops.rsqrt(squares + 1e-6)
    return keras.Model(image, predictions)


def attended_features(encoder, decoder):
    """Features by task, from an attention module per task and block: section 3 of the paper.

    As in the paper's code, the tasks share the convolutions between their modules.
    """
    after_encoder = [convolution(filters) for filters in (*FILTERS[1:], FILTERS[-1])]
    before_decoder = [convolution(filters) for filters in FILTERS[::-1]]
    features = {}
    for task in TASKS:
        attended = None
        for (first, last), convolve in zip(encoder, after_encoder, strict=True):
            attended = layers.MaxPooling2D()(convolve(attend(first, last, attended)))
        for (first, last), convolve in zip(decoder, before_decoder, strict=True):
            attended = convolve(layers.UpSampling2D(interpolation="bilinear")(attended))
            attended = attend(first, last, attended)
        features[task] = attended
    return features


def attend(first, last, attended):
    """A block's last features, masked according to its first ones and to the module before."""
    merged = first if attended is None else layers.Concatenate()([first, attended])
    filters = last.shape[-1]
    mask = convolution(filters, 1, "sigmoid")(convolution(filters, 1)(merged))
    return layers.Multiply()([mask, last])


def train(x, y, epochs, attention, loss_weights=None, callbacks=()):
    """The trained model and its history; the same start and batches whatever the weights."""
    keras.utils.set_random_seed(0)
    model = build_model(attention)
    steps = epochs * math.ceil(len(x) / BATCH_SIZE)
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, steps))
    model.compile(optimizer=optimizer, loss=LOSSES, loss_weights=loss_weights)
    history = model.fit(
        x, y, epochs=epochs, batch_size=BATCH_SIZE, verbose=0, callbacks=list(callbacks)
    )
    return model, history.history


def task_metrics(predictions, truths):
    """The paper's metrics, over all the pixels that have a truth."""
    is_labelled, is_sensed = truths["semantic"] >= 0, truths["depth"][..., 0] > 0
    labels, found = truths["semantic"][is_labelled], predictions["semantic"].argmax(-1)[is_labelled]
    confusion = np.zeros((len(CLASSES), len(CLASSES)))
    np.add.at(confusion, (labels, found), 1)
    both = np.diag(confusion)
    either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
    depths = truths["depth"][is_sensed]
    errors = np.abs(predictions["depth"][is_sensed] - depths)
    cosines = np.sum(predictions["normals"] * truths["normals"], axis=-1)[is_sensed]
    degrees = np.degrees(np.arccos(np.clip(cosines, -1, 1)))
    return {
        "semantic: mIoU": np.mean(both[either > 0] / either[either > 0]),
        "semantic: pixel accuracy": np.mean(found == labels),
        "depth: absolute error in metres": errors.mean(),
        "depth: relative error": np.mean(errors / depths),
        "normals: mean angle in degrees": degrees.mean(),
        "normals: median angle": np.median(degrees),
        "normals: share within 11.25": np.mean(degrees < 11.25),
        "normals: share within 22.5": np.mean(degrees < 22.5),
        "normals: share within 30": np.mean(degrees < 30),
    }


def print_epochs(history):
    print(f"{'':5} | " + " | ".join(f"{task:^15}" for task in TASKS).rstrip())
    print("epoch | " + " | ".join(f"{'loss':>7} {'weight':>7}" for _ in TASKS))
    print("------+-" + "-+-".join("-" * 15 for _ in TASKS))
    for epoch in range(len(history["loss"])):
        cells = (
            f"{history[f'{task}_loss'][epoch]:7.4f} {history[f'{task}_weight'][epoch]:7.3f}"
            for task in TASKS
        )
        print(f"{epoch + 1:5} | " + " | ".join(cells))


def compare(predictions, truths):
    """Prints each metric, for predictions by the name of their weighting."""
    title = f"on {len(truths['depth'])} test scenes"
    print(f"\n{title:31} | " + " | ".join(f"{name:>13}" for name in predictions))
    print("-" * 31 + "-+-" + "-+-".join("-" * 13 for _ in predictions))
    metrics = [task_metrics(prediction, truths) for prediction in predictions.values()]
    for metric in metrics[0]:
        print(f"{metric:31} | " + " | ".join(f"{values[metric]:13.4f}" for values in metrics))


def write_picture(path, image, prediction, truth, history):
    """One scene, its predictions above its truths (grey where it has none); then the history."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from keras_dwa import plot_history

    canvas = FigureCanvasAgg(plot_history(history))
    canvas.draw()
    pictures = {"input": image, "history": np.asarray(canvas.buffer_rgba())}
    furthest = truth["depth"].max()
    to_colours = {
        "semantic": lambda labels: COLOURS[labels],
        "depth": lambda depths: colormaps["viridis"](depths[..., 0] / furthest)[..., :3],
        "normals": lambda normals: (normals + 1) / 2,
    }
    prediction = {**prediction, "semantic": prediction["semantic"].argmax(axis=-1)}
    is_valid = dict.fromkeys(TASKS, truth["depth"] > 0)
    is_valid["semantic"] = truth["semantic"][..., None] >= 0
    for task in TASKS:
        pictures[f"{task}: prediction"] = to_colours[task](prediction[task])
        pictures[f"{task}: truth"] = np.where(is_valid[task], to_colours[task](truth[task]), 0.9)

    heights = (2, 2, pictures["history"].shape[0] / canvas.figure.dpi)
    rows = [
        ["input", *(f"{task}: prediction" for task in TASKS)],
        ["classes", *(f"{task}: truth" for task in TASKS)],
        ["history"] * 4,
    ]
    figure = Figure((10, sum(heights)), dpi=canvas.figure.dpi, layout="constrained")
    panels = figure.subplot_mosaic(rows, height_ratios=heights)
    for title, picture in pictures.items():
        panels[title].imshow(picture)
        panels[title].set_title(title)
    for name, colour in zip(CLASSES, COLOURS, strict=True):
        panels["classes"].scatter([], [], marker="s", color=colour, label=name)
    panels["classes"].legend(loc="center", ncols=2, frameon=False)
    for panel in panels.values():
        panel.set_axis_off()
    figure.savefig(path, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--scenes", type=int, default=320, help="a fifth of them to test on")
    parser.add_argument("--attention", action="store_true", help="one attention network per task")
    parser.add_argument("--picture", default="dense_prediction.png", help='"" for none')
    arguments = parser.parse_args()
    if arguments.picture:
        importlib.import_module("matplotlib")  # To fail now, not after minutes of training.

    images, truths = random_scenes(arguments.scenes)
    split = arguments.scenes - arguments.scenes // 5
    x, y = images[:split], {task: truth[:split] for task, truth in truths.items()}
    test_x, test_y = images[split:], {task: truth[split:] for task, truth in truths.items()}
    epochs, attention = arguments.epochs, arguments.attention
    dwa = DynamicWeightAverage(list(TASKS), temperature=2.0)
    weighted, history = train(x, y, epochs, attention, dwa.loss_weights, [dwa])
    equal, _ = train(x, y, epochs, attention)

    print(f"Keras {keras.__version__} on {keras.backend.backend()}: {epochs} epochs with {dwa}\n")
    print_epochs(history)
    models = {"DWA": weighted, "equal weights": equal}
    predictions = {name: model.predict(test_x, verbose=0) for name, model in models.items()}
    compare(predictions, test_y)
    if arguments.picture:
        prediction = {task: values[0] for task, values in predictions["DWA"].items()}
        truth = {task: values[0] for task, values in test_y.items()}
        write_picture(arguments.picture, test_x[0], prediction, truth, history)


if __name__ == "__main__":
    main()
