"""Three tasks for each pixel of a scene: its class, its depth and its normal.

    python examples/dense_prediction.py [--attention] [--full]

You will see a network train under equal weights and by Dynamic Weight Average
(DWA), with a line of losses and weights for each epoch, and a table of both on
test scenes. Takes less than a minute on two CPU cores. The last line counts the
metrics that DWA improves; dense_prediction.png shows a scene with the
predictions and the truth (needs matplotlib).

This is the setting of Liu, Johns & Davison, "End-to-End Multi-Task Learning
with Attention", CVPR 2019, in small: rooms with spheres and boxes, which NumPy
renders, replace NYUv2. Losses and metrics are those of the paper's code,
https://github.com/lorenmt/mtan. `--attention` adds the paper's attention
networks (MTAN), and takes minutes to compile on JAX. `--full` has larger
scenes, more of them, and a larger network, and takes five minutes or more. The
backend is the one that KERAS_BACKEND names: tensorflow, jax (if it is unset) or
torch.
"""

import argparse
import math
import os
from functools import partial

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras import layers, ops

from keras_dwa import DynamicWeightAverage, LossWeighting

CLASSES = ("floor", "side wall", "back wall", "ball", "balloon")
CLASSES += ("crate", "pillar", "slab")
HUES = np.add.outer(np.arange(8) / 8, np.arange(3) / 3)
COLOURS = 0.5 + 0.4 * np.cos(2 * np.pi * HUES)
# Half the size of boxes in metres, at least and at most.
BOXES = {
    "crate": ((0.3, 0.3, 0.3), (0.5, 0.5, 0.5)),
    "pillar": ((0.12, 0.8, 0.12), (0.25, 1.2, 0.25)),
    "slab": ((0.5, 0.06, 0.4), (0.9, 0.15, 0.7)),
}
# The channels of each task's prediction.
TASKS = {"semantic": len(CLASSES), "depth": 1, "normals": 3}
BATCH_SIZE = 8


# The scenes. x points right, y up and z backwards, in metres. A ray (x, y, -1)
# of the camera, multiplied by a depth, is a point at that depth. Each `hit_*`
# returns the depth at which rays meet a surface, shape (H, W), inf where they
# miss it, and its unit normal there, (H, W, 3).


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
    """Depth and normal of the first surface on each ray, and its index."""
    hits = [hit(origin, rays) for _, hit in surfaces]
    depths, normals = (np.stack(values) for values in zip(*hits, strict=True))
    index = depths.argmin(axis=0)
    rows, columns = np.indices(index.shape)
    return depths[index, rows, columns], normals[index, rows, columns], index


def rotation(axis, angle):
    """The matrix that turns columns by `angle` radians about axis 0, 1 or 2."""
    sine, cosine = np.sin(angle), np.cos(angle)
    matrix = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    return np.roll(matrix, axis + 1, axis=(0, 1))


def random_room(random):
    """Floor, walls and four to eight objects, as (class, hit function)."""
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
        centre = random.uniform(
            (left + 0.5, 1, back + 0.5), (right - 0.5, 2, -2.5)
        )
        if name in BOXES:
            half_size = random.uniform(*BOXES[name])
            centre[1] = half_size[1]
            turned = rotation(1, random.uniform(0, np.pi))
            hit = partial(
                hit_box, centre=centre, half_size=half_size, to_world=turned
            )
        else:
            radius = random.uniform(0.25, 0.6)
            if name == "ball":
                centre[1] = radius
            hit = partial(hit_sphere, centre=centre, radius=radius)
        surfaces.append((name, hit))
    return surfaces


def render(random, height, width):
    """A random scene: the image (H, W, 3) in [0, 1], and each task's truth.

    The truths are labels (H, W), depths (H, W, 1) in metres, and unit normals
    (H, W, 3) in the camera's frame. A pixel without one has the label -1, the
    depth 0 and the normal 0: above the walls, and in the holes that annotator
    and sensor leave.
    """
    surfaces = random_room(random)
    yaw, pitch, roll = random.uniform((-0.4, -0.4, -0.1), (0.4, -0.1, 0.1))
    to_world = rotation(1, yaw) @ rotation(0, pitch) @ rotation(2, roll)
    y, x = np.mgrid[0.5:height, 0.5:width]
    x, y = x - width / 2, height / 2 - y
    rays = np.stack([x, y, np.full_like(x, -0.8 * width)], axis=-1)
    rays = rays / (0.8 * width) @ to_world.T
    camera = np.array([0, random.uniform(1.3, 1.8), 0])
    depth, normal, index = nearest_hit(surfaces, camera, rays)
    is_hit = np.isfinite(depth)
    points = camera + np.where(is_hit, depth, 0)[..., None] * rays

    to_light = random.uniform((-0.6, 0.6, 0.2), (0.6, 1.0, 0.8))
    to_light /= np.linalg.norm(to_light)
    rays_to_light = np.broadcast_to(to_light, rays.shape)
    shade, *_ = nearest_hit(surfaces, points + 1e-3 * normal, rays_to_light)
    light = 0.6 + 0.5 * np.isinf(shade) * np.maximum(normal @ to_light, 0)
    period = random.uniform(0.5, 1.0, size=len(surfaces))[index, None]
    chequers = np.sign(np.sin(2 * np.pi * points / period + 1).prod(axis=-1))
    labels = np.array([CLASSES.index(name) for name, _ in surfaces])
    tints = random.uniform(size=(len(surfaces), 3))
    colour = (0.6 * COLOURS[labels] + 0.4 * tints)[index]
    image = colour * (light * (1 + 0.12 * chequers))[..., None]
    image = np.where(is_hit[..., None], image, (0.75, 0.85, 0.95))
    image = np.clip(image + random.normal(scale=0.03, size=image.shape), 0, 1)

    is_labelled, is_sensed = (
        is_hit & ~holes(random, height, width) for _ in range(2)
    )
    return image.astype("float32"), {
        "semantic": np.where(is_labelled, labels[index], -1),
        "depth": np.where(is_sensed, depth, 0)[..., None].astype("float32"),
        "normals": (is_sensed[..., None] * (normal @ to_world)).astype(
            "float32"
        ),
    }


def holes(random, height, width):
    """A mask (H, W) of blotches, about one pixel in twenty."""
    mask = random.uniform(size=(height // 4, width // 4)) < 0.05
    return mask.repeat(4, 0).repeat(4, 1)


def random_scenes(count, size=(24, 32)):
    random = np.random.default_rng(0)
    images, truths = zip(
        *(render(random, *size) for _ in range(count)), strict=True
    )
    return np.stack(images), {
        task: np.stack([truth[task] for truth in truths]) for task in TASKS
    }


# The losses, averaged over those pixels of a batch that have a truth.


def semantic_loss(labels, logits):
    """Cross-entropy of labels (B, H, W) and logits (B, H, W, C)."""
    labels = ops.cast(labels, "int32")
    losses = ops.sparse_categorical_crossentropy(
        ops.maximum(labels, 0), logits, from_logits=True
    )
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


LOSSES = {
    "semantic": semantic_loss,
    "depth": depth_loss,
    "normals": normals_loss,
}


def convolution(filters, size=3, activation="relu"):
    convolve = layers.Conv2D(filters, size, padding="same", use_bias=False)
    # An epoch has few batches: the default, 0.99, would average too long.
    normalize = layers.BatchNormalization(momentum=0.9)
    return keras.Sequential(
        [convolve, normalize, layers.Activation(activation)]
    )


def build_model(attention=False, size=(24, 32), blocks=(8, 16)):
    """The paper's SegNet, with fewer and narrower blocks, or its MTAN.

    SegNet unpools by the indices of its encoder's maxima. Keras has no layer
    for that, so this decoder gets the encoder's features instead.
    """
    image = last = keras.Input((*size, 3))
    encoder, decoder = [], []  # The first and the last features of each block.
    for filters in blocks:
        first = convolution(filters)(last)
        encoder.append((first, convolution(filters)(first)))
        last = layers.MaxPooling2D()(encoder[-1][1])
    for filters, (_, skipped) in zip(blocks[::-1], encoder[::-1], strict=True):
        first = layers.Concatenate()([layers.UpSampling2D()(last), skipped])
        last = convolution(filters)(first)
        decoder.append((first, last))
    features = dict.fromkeys(TASKS, last)
    if attention:
        features = attended_features(encoder, decoder, blocks)
    predictions = {
        task: layers.Conv2D(channels, 1)(convolution(blocks[0])(features[task]))
        for task, channels in TASKS.items()
    }
    # On JAX and torch, the gradient of Keras's UnitNormalization is NaN at 0.
    squares = ops.sum(
        ops.square(predictions["normals"]), axis=-1, keepdims=True
    )
    predictions["normals"] *= ops.rsqrt(squares + 1e-6)
    return keras.Model(image, predictions)


def attended_features(encoder, decoder, blocks):
    """Features by task, from attention modules: section 3 of the paper.

    As in the paper's code, the tasks share the convolutions between modules.
    """
    after_encoder = [
        convolution(filters) for filters in (*blocks[1:], blocks[-1])
    ]
    before_decoder = [convolution(filters) for filters in blocks[::-1]]
    features = {}
    for task in TASKS:
        attended = None
        for (first, last), convolve in zip(encoder, after_encoder, strict=True):
            attended = layers.MaxPooling2D()(
                convolve(attend(first, last, attended))
            )
        for (first, last), convolve in zip(
            decoder, before_decoder, strict=True
        ):
            attended = convolve(
                layers.UpSampling2D(interpolation="bilinear")(attended)
            )
            attended = attend(first, last, attended)
        features[task] = attended
    return features


def attend(first, last, attended):
    """A block's last features, masked by its first and the module before."""
    merged = (
        first if attended is None else layers.Concatenate()([first, attended])
    )
    filters = last.shape[-1]
    mask = convolution(filters, 1, "sigmoid")(convolution(filters, 1)(merged))
    return layers.Multiply()([mask, last])


def train(model, x, y, epochs, weighting, name):
    steps = epochs * math.ceil(len(x) / BATCH_SIZE)
    rate = keras.optimizers.schedules.CosineDecay(5e-3, steps)
    model.compile(
        optimizer=keras.optimizers.Adam(rate),
        loss=LOSSES,
        loss_weights=weighting.loss_weights,
    )

    def show(epoch, logs):
        cells = (
            f"{task} {logs[f'{task}_loss']:.4f} ({logs[f'{task}_weight']:.3f})"
            for task in TASKS
        )
        print(f"{name}, epoch {epoch + 1}: {', '.join(cells)}", flush=True)

    model.fit(
        x,
        y,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        verbose=0,
        callbacks=[
            weighting,
            keras.callbacks.LambdaCallback(on_epoch_end=show),
        ],
    )


def task_metrics(predictions, truths):
    """The paper's metrics, over all the pixels that have a truth."""
    is_labelled = truths["semantic"] >= 0
    is_sensed = truths["depth"][..., 0] > 0
    labels = truths["semantic"][is_labelled]
    found = predictions["semantic"].argmax(-1)[is_labelled]
    confusion = np.zeros((len(CLASSES), len(CLASSES)))
    np.add.at(confusion, (labels, found), 1)
    both = np.diag(confusion)
    either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
    depths = truths["depth"][is_sensed]
    errors = np.abs(predictions["depth"][is_sensed] - depths)
    cosines = np.sum(predictions["normals"] * truths["normals"], axis=-1)
    degrees = np.degrees(np.arccos(np.clip(cosines[is_sensed], -1, 1)))
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


HIGHER_IS_BETTER = {
    "semantic: mIoU",
    "semantic: pixel accuracy",
    "normals: share within 11.25",
    "normals: share within 22.5",
    "normals: share within 30",
}


def compare(metrics):
    """Prints each metric, by the name of the weighting."""
    print("\n" + " | ".join([" " * 31, *(f"{name:>13}" for name in metrics)]))
    print("-+-".join(["-" * 31, *("-" * 13 for _ in metrics)]))
    for metric in metrics["DWA"]:
        values = (f"{values[metric]:13.4f}" for values in metrics.values())
        print(" | ".join([f"{metric:31}", *values]))


def save_picture(path, image, prediction, truth):
    """A scene, its predictions, and its truths: grey where it has none."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        print("No picture: it needs matplotlib.")
        return

    furthest = truth["depth"].max()
    to_colours = {
        "semantic": lambda labels: COLOURS[labels],
        "depth": lambda depths: colormaps["viridis"](depths[..., 0] / furthest)[
            ..., :3
        ],
        "normals": lambda normals: (normals + 1) / 2,
    }
    prediction = {**prediction, "semantic": prediction["semantic"].argmax(-1)}
    is_valid = dict.fromkeys(TASKS, truth["depth"] > 0)
    is_valid["semantic"] = truth["semantic"][..., None] >= 0

    figure = Figure((10, 4), layout="constrained")
    panels = figure.subplots(2, 1 + len(TASKS))
    panels[0, 0].imshow(image)
    panels[0, 0].set_title("input")
    for column, (task, colours) in enumerate(to_colours.items(), start=1):
        panels[0, column].imshow(colours(prediction[task]))
        panels[0, column].set_title(f"{task}: DWA")
        shown = np.where(is_valid[task], colours(truth[task]), 0.9)
        panels[1, column].imshow(shown)
        panels[1, column].set_title(f"{task}: truth")
    for name, colour in zip(CLASSES, COLOURS, strict=True):
        panels[1, 0].scatter([], [], marker="s", color=colour, label=name)
    panels[1, 0].legend(loc="center", ncols=2, frameon=False, fontsize=8)
    for panel in panels.flat:
        panel.set_axis_off()
    figure.savefig(path, dpi=110)
    print(f"Picture: {os.path.abspath(path)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--scenes", type=int, help="a fifth of them to test on")
    parser.add_argument(
        "--full", action="store_true", help="minutes, not seconds"
    )
    parser.add_argument("--attention", action="store_true", help="MTAN")
    parser.add_argument(
        "--picture", default="dense_prediction.png", metavar="FILE"
    )
    arguments = parser.parse_args()
    size = (48, 64) if arguments.full else (24, 32)
    blocks = (16, 32, 64) if arguments.full else (8, 16)
    count = arguments.scenes or (320 if arguments.full else 150)
    epochs = arguments.epochs or (15 if arguments.full else 10)

    images, truths = random_scenes(count, size)
    split = count - count // 5
    x, y = images[:split], {task: truths[task][:split] for task in TASKS}
    test_x, test_y = (
        images[split:],
        {task: truths[task][split:] for task in TASKS},
    )
    weightings = {
        "equal weights": LossWeighting(list(TASKS)),
        "DWA": DynamicWeightAverage(list(TASKS)),
    }
    print(
        f"Keras {keras.__version__} on {keras.backend.backend()}: "
        f"{split} scenes, {epochs} epochs each. "
        "Losses (and weights):",
        flush=True,
    )
    metrics = {}
    for name, weighting in weightings.items():
        keras.utils.set_random_seed(0)  # The same start and the same batches.
        model = build_model(arguments.attention, size, blocks)
        train(model, x, y, epochs, weighting, name)
        predictions = model.predict(test_x, verbose=0)
        metrics[name] = task_metrics(predictions, test_y)
    compare(metrics)
    if arguments.picture:
        prediction = {task: predictions[task][0] for task in TASKS}
        truth = {task: test_y[task][0] for task in TASKS}
        save_picture(arguments.picture, test_x[0], prediction, truth)

    equal, dwa = metrics.values()
    gains = [
        (1 if metric in HIGHER_IS_BETTER else -1)
        * (dwa[metric] / equal[metric] - 1)
        for metric in equal
    ]
    print(
        f"On {count - split} test scenes, DWA is better than equal weights in "
        f"{sum(gain > 0 for gain in gains)} of {len(gains)} metrics, and "
        f"{100 * np.mean(gains):+.1f} % better on average."
    )


if __name__ == "__main__":
    main()
