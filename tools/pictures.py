"""Makes the pictures of the manual from real runs of the tasks of `examples/digits.py`.

    KERAS_BACKEND=tensorflow python tools/pictures.py

Needs TensorFlow, TensorBoard, matplotlib, scikit-learn, Pillow and Selenium, and the browser
`chromium` with its driver.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import keras
from matplotlib.figure import Figure
from PIL import Image
from selenium import webdriver

import keras_dwa

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
sys.path.append(str(ROOT / "examples"))
from digits import TASKS, build_model, rotated_digits  # noqa: E402

TEMPERATURES = (0.5, 1.0, 2.0, 5.0)
NO_DATE = {"Date": None}
COLORS = ("#0072B2", "#D55E00", "#009E73")


def train(temperature, folder):
    """The history of 20 epochs at a temperature, all else being equal."""
    keras.utils.set_random_seed(0)
    x, y = rotated_digits()
    model = build_model()
    dwa = keras_dwa.DynamicWeightAverage(list(TASKS), temperature)
    model.compile(optimizer="adam", loss=TASKS, loss_weights=dwa.loss_weights)
    board = keras.callbacks.TensorBoard(f"{folder}/{temperature}")
    callbacks = [dwa, board]
    return model.fit(x, y, epochs=20, validation_split=0.2, verbose=0, callbacks=callbacks)


def draw_temperatures(histories):
    figure = Figure((9, 2.8), layout="constrained")
    panels = figure.subplots(1, len(histories), sharey=True)
    for panel, (temperature, history) in zip(panels, histories.items(), strict=True):
        for name, color in zip(TASKS, COLORS, strict=True):
            weights = history.history[f"{name}_weight"]
            panel.plot(range(1, 1 + len(weights)), weights, color=color, label=name)
        panel.axhline(1, color="0.5", linestyle=":", label="uniform")
        panel.set(title=f"T = {temperature:g}", xlabel="epoch", xticks=[1, 5, 10, 15, 20])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("weight")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def photograph_tensorboard(folder, path):
    """The page of the real TensorBoard, in a real browser."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    command = ["tensorboard", "--logdir", folder, "--port", address.split(":")[1]]
    server = subprocess.Popen([*command, "--load_fast=false"], stderr=subprocess.DEVNULL)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        *("headless", "no-sandbox", "window-size=1900,660", "hide-scrollbars"),
        "force-device-scale-factor=2",
    ):
        options.add_argument(f"--{argument}")
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        while not has_runs(address):
            time.sleep(1)
        browser.get(f"http://{address}/?tagFilter=weight&smoothing=0#timeseries")
        time.sleep(10)  # It draws in its own threads, and does not report when they are done.
        browser.save_screenshot(path)
    finally:
        browser.quit()
        server.terminate()


def has_runs(address):
    try:
        return b"train" in urllib.request.urlopen(f"http://{address}/data/runs").read()
    except OSError:
        return False


def shrink(path):
    """Reduces the colours, which cuts the file to a quarter."""
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def main():
    PICTURES.mkdir(exist_ok=True)
    folder = tempfile.mkdtemp()
    histories = {temperature: train(temperature, folder) for temperature in TEMPERATURES}
    draw_temperatures(histories).savefig(PICTURES / "temperatures.svg", metadata=NO_DATE)
    figure = keras_dwa.plot_history(histories[2.0])
    figure.savefig(PICTURES / "history.svg", metadata=NO_DATE)
    photograph_tensorboard(f"{folder}/2.0", PICTURES / "tensorboard.png")
    shrink(PICTURES / "tensorboard.png")


if __name__ == "__main__":
    main()
