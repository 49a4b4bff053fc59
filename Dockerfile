# What runs the app's processes: Flower's SuperExec with fedsim and all that it needs. The code of
# an app travels in its bundle; the packages it imports must be here, for nothing is installed when
# a run starts.
ARG FLOWER_VERSION=1.42.0
FROM flwr/superexec:${FLOWER_VERSION}

# The CPU wheels of torch; https://pypi.org/simple has the CUDA ones (deploy/gpu.yml).
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# Torch is by far the largest layer and changes least: it goes first, before any of our files but
# the pinned versions.
RUN mkdir -p /app/build /app/runs /app/state /app/data /app/.flwr
COPY --chown=app:app constraints.txt /app/build/
RUN python -m pip install --no-cache-dir --constraint /app/build/constraints.txt \
    --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple torch

COPY --chown=app:app pyproject.toml README.md LICENSE /app/build/
COPY --chown=app:app fedsim /app/build/fedsim
COPY --chown=app:app strategies /app/build/strategies
COPY --chown=app:app clients /app/build/clients
COPY --chown=app:app scenarios /app/build/scenarios

# Extras of fedsim, such as [metrics] (deploy/metrics.yml).
ARG EXTRAS=

# Ray drives simulations and has no work on a node, so the extra that brings it is left out. Flower
# itself must stay the one of the base image: components of two versions refuse each other.
RUN flower="$(python -c 'from importlib.metadata import version; print(version("flwr"))')" \
    && sed -i 's/flwr\[simulation\]/flwr/' /app/build/pyproject.toml \
    && python -m pip install --no-cache-dir --constraint /app/build/constraints.txt \
       "flwr==${flower}" "/app/build${EXTRAS}" \
    && rm -rf /app/build

ENV FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    OMP_NUM_THREADS=1
