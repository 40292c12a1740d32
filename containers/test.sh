#!/usr/bin/env bash
# Build both images and run them on the demo data: foreign user, read-only root, no network,
# read-only input. Needs a builder (docker; or, as root, buildah with podman and runc, for which
# the base image is made by mmdebstrap when no registry is to be had). Says so where there is none.
#   containers/test.sh            both recipes
#   CONT_DIR=/somewhere           keep base image and storage there between calls
#   PIP_FIND_LINKS=/wheels        take wheels (torch) from a local folder
set -euo pipefail
cd "$(dirname "$0")/.."
CONT_DIR=$(realpath -m "${CONT_DIR:-$(mktemp -d)}")
PYTHON=${PYTHON:-python3}
TAG=localhost/qsmpipe:dev
CA=/etc/ssl/certs/ca-certificates.crt
mkdir -p "$CONT_DIR"

if command -v docker >/dev/null && docker info >/dev/null 2>&1; then
    BUILDER=docker
elif [ "$(id -u)" = 0 ] && command -v buildah >/dev/null && command -v podman >/dev/null &&
    command -v runc >/dev/null; then
    BUILDER=buildah
else
    echo "NOT TESTED: no container builder here (neither a Docker engine, nor root with buildah, podman and runc)"
    exit 0
fi
echo "builder: $BUILDER"

STORE=(--root "$CONT_DIR/storage" --runroot "$CONT_DIR/runroot" --storage-driver overlay)
MOUNTS=(-v "$CA:$CA:ro")
ARGS=()
if [ -n "${PIP_FIND_LINKS:-}" ]; then
    MOUNTS+=(-v "$PIP_FIND_LINKS:$PIP_FIND_LINKS:ro")
    ARGS+=(--build-arg "PIP_FIND_LINKS=$PIP_FIND_LINKS")
fi
for name in PIP_INDEX_URL PIP_CONFIG_FILE; do
    if [ -n "${!name:-}" ]; then ARGS+=(--build-arg "$name=${!name}"); fi
done
for file in /etc/pip.conf "$HOME/.config/pip/pip.conf"; do # this machine's own package index
    if [ -s "$file" ]; then MOUNTS+=(-v "$file:/etc/pip.conf:ro"); fi
done

base() { # a base image without a registry
    if ! podman "${STORE[@]}" image exists localhost/base:bookworm 2>/dev/null; then
        [ -s "$CONT_DIR/base.tar" ] || mmdebstrap --variant=minbase \
            --include=python3,python3-pip,python3-venv,ca-certificates bookworm "$CONT_DIR/base.tar"
        podman "${STORE[@]}" import "$CONT_DIR/base.tar" localhost/base:bookworm
    fi
}

build() { # FILE TAG
    if [ "$BUILDER" = docker ]; then
        docker build -f "$1" -t "$2" "${ARGS[@]}" .
    else
        base
        buildah "${STORE[@]}" bud --isolation chroot --format docker \
            --build-arg BASE=localhost/base:bookworm "${ARGS[@]}" "${MOUNTS[@]}" -f "$1" -t "$2" .
    fi
}

run() { # TAG WORDS...
    local flags=(--rm --network none --user 12345:23456 --read-only --tmpfs /tmp:exec
        -v "$CONT_DIR/in:/data:ro" -v "$CONT_DIR/out:/out:rw" -v "$CONT_DIR/work:/work:rw")
    if [ "$BUILDER" = docker ]; then
        docker run "${flags[@]}" "$@"
    else
        podman "${STORE[@]}" --cgroup-manager cgroupfs --runtime runc run \
            --ulimit nofile=1024:1024 --ulimit nproc=4096:4096 "${flags[@]}" "$@"
    fi
}

check() { # TAG: version, the whole run, its files and their owner, the input untouched
    local tag=$1 expected
    rm -rf "$CONT_DIR"/{in,out,work}
    mkdir -p "$CONT_DIR"/{in,out,work}
    chmod 777 "$CONT_DIR"/{out,work}
    cp -r bids_examples/gre3t/. "$CONT_DIR/in/"
    before=$(cd "$CONT_DIR/in" && find . -type f -exec sha256sum {} + | sort | sha256sum)
    expected=$(sed -n 's/^__version__ = "\(.*\)"/qsmpipe \1/p' qsmpipe/__init__.py)
    [ "$(run "$tag" --version)" = "$expected" ]
    run "$tag" /data /out participant --work-dir /work
    after=$(cd "$CONT_DIR/in" && find . -type f -exec sha256sum {} + | sort | sha256sum)
    [ "$before" = "$after" ]
    (cd "$CONT_DIR/out" && find sub-* -type f | sort) | diff - bids_examples/gre3t.txt
    [ -z "$(find "$CONT_DIR/out" ! -user 12345 ! -path "$CONT_DIR/out")" ]
    echo "passed: $tag"
}

VERSION=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' qsmpipe/__init__.py)
ARGS+=(--build-arg "VERSION=$VERSION")
build containers/Dockerfile "$TAG"
check "$TAG"

# The Apptainer recipe: built by Apptainer where it is installed; else its %post and %runscript
# are run on the same base, as a Dockerfile made from the recipe's own sections.
if command -v apptainer >/dev/null; then
    apptainer build --force "$CONT_DIR/qsmpipe.sif" containers/qsmpipe.def
    apptainer test "$CONT_DIR/qsmpipe.sif"
    rm -rf "$CONT_DIR"/{out,work} && mkdir -p "$CONT_DIR"/{out,work}
    apptainer run --cleanenv --net --network none -B "$CONT_DIR/in:/data:ro" \
        -B "$CONT_DIR/out:/out" -B "$CONT_DIR/work:/work" "$CONT_DIR/qsmpipe.sif" \
        /data /out participant --work-dir /work
    (cd "$CONT_DIR/out" && find sub-* -type f | sort) | diff - bids_examples/gre3t.txt
    echo "passed: qsmpipe.sif"
else
    echo "no Apptainer here: running the recipe's sections in a container instead"
    "$PYTHON" containers/def_to_dockerfile.py containers/qsmpipe.def "$CONT_DIR/Dockerfile.def"
    build "$CONT_DIR/Dockerfile.def" localhost/qsmpipe:def
    check localhost/qsmpipe:def
fi
