# Gliode's environment as an image: the same package lists as scripts/env.
#   docker build -t gliode .
#   docker run --rm -v "$PWD:$PWD" -w "$PWD" gliode make demo
FROM debian:trixie
COPY scripts/packages /opt/packages
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates $(sed 's/#.*//' /opt/packages/debian.txt) \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv --system-site-packages /opt/gliode \
    && /opt/gliode/bin/pip install --no-cache-dir -r /opt/packages/pip.txt
# As in scripts/env: one machine, more ranks than cores are fine, pictures without a display.
ENV PATH=/opt/gliode/bin:/usr/bin:/bin \
    LC_ALL=C.UTF-8 \
    OMPI_MCA_pml=ob1 \
    OMPI_MCA_btl=self,sm \
    PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe \
    VTK_DEFAULT_OPENGL_WINDOW=vtkEGLRenderWindow
