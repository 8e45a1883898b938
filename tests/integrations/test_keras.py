"""Keras on torch, in a process of its own: its backend is chosen when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("keras") is None:
    pytest.skip("keras is not installed: pip install 'pytracker[keras]'", allow_module_level=True)

PROGRAM = """
import keras, numpy as np, torch
torch.set_num_threads(1)
from pytracker.integrations.keras import PytrackerCallback

keras.utils.set_random_seed(0)
x = np.random.default_rng(0).normal(size=(20, 4)).astype("float32")
y = x.sum(1, keepdims=True)

for wrap in (lambda inner: inner, lambda inner: keras.optimizers.LossScaleOptimizer(inner, initial_scale=64.0)):
    model = keras.Sequential([keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)])
    rate = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.9)
    optimizer = wrap(keras.optimizers.SGD(rate, clipnorm=1e-3))
    model.compile(optimizer, loss="mse")
    norms, losses = [], []
    apply = optimizer.apply

    def seen(grads, variables=None):  # what Keras is about to unscale and clip
        scale = 64.0 if hasattr(optimizer, "dynamic_scale") else 1.0
        norms.append(np.sqrt(sum((g.double().numpy() ** 2).sum() for g in grads)) / scale)
        return apply(grads, variables)

    optimizer.apply = seen
    callback = PytrackerCallback(diagnosis=None)
    model.fit(x, y, batch_size=8, epochs=2, validation_data=(x, y), callbacks=[callback], verbose=0, shuffle=False)
    history = callback.tracker.history
    np.testing.assert_allclose(history["grad_norm"][:], norms, rtol=1e-12)
    assert len(norms) == 6, norms
    assert history["val_loss"].steps.tolist() == [2, 5]
    assert history["epoch"].steps.tolist() == [2, 5]
    np.testing.assert_allclose(history["lr"][:], [0.1 * 0.9**step for step in range(6)], rtol=1e-6)
    model.fit(x, y, batch_size=8, epochs=1, callbacks=[callback], verbose=0, shuffle=False)
    assert history["grad_norm"].steps.tolist() == list(range(9))
    names = [info.name for info in history.parameters.infos]
    assert names == [variable.path for variable in model.trainable_variables]
    predicted = model.predict(x[:8], verbose=0)
    expected = float(np.mean((predicted - y[:8]) ** 2))
    model.fit(x[:8], y[:8], batch_size=8, callbacks=[callback], verbose=0)
    callback.close()
    np.testing.assert_allclose(history["loss"][-1], expected, rtol=1e-5)
"""


def test_gradients_before_the_clip_the_batch_s_own_loss_rate_and_scale(tmp_path: Path) -> None:
    environment = os.environ | {"KERAS_BACKEND": "torch", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
