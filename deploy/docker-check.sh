#!/usr/bin/env bash
# Builds the image and tests it. Without root, network, capabilities and writable files outside /tmp, the server has to
# become healthy, answer, and end with status 0 on SIGTERM; `allattn generate` has to work too.
#   deploy/docker-check.sh
# Environment: ENGINE, docker, podman or buildah (default: the first that works here); IMAGE, its name (allattn);
# BUILD_FLAGS, more flags for the build; START_S, seconds to become healthy (120).
# buildah cannot run such a container: with buildah the script enters the image in new namespaces, which needs root.
set -euo pipefail
cd "$(dirname "$0")/.."
for engine in docker podman buildah; do
    [ -n "${ENGINE:-}" ] || ! "$engine" info > /dev/null 2>&1 || ENGINE=$engine
done
IMAGE=${IMAGE:-allattn}
PROBE=(python -m deploy.probe) # the image's HEALTHCHECK, which a test compares
read -ra FLAGS <<< "${BUILD_FLAGS:-}"

start_in_a_container() {
    id=$($ENGINE run --detach --read-only --tmpfs /tmp --network none --cap-drop ALL \
        --security-opt no-new-privileges "$IMAGE")
    trap '$ENGINE rm --force "$id" > /dev/null' EXIT
    inside() { "$ENGINE" exec -i "$id" "$@"; }
    is_there() { [ "$($ENGINE inspect --format '{{.State.Running}}' "$id")" = true ]; }
    stop() { "$ENGINE" stop -t 40 "$id" > /dev/null && return "$($ENGINE inspect --format '{{.State.ExitCode}}' "$id")"; }
}

start_in_namespaces() {
    id=$(buildah from --pull-never "$IMAGE")
    trap 'kill -KILL "${pid:-}" 2> /dev/null || true; buildah rm "$id" > /dev/null' EXIT
    local root user env entry
    root=$(buildah mount "$id")
    user=$(buildah inspect --format '{{.OCIv1.Config.User}}' "$id")
    mapfile -t env < <(buildah inspect --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$id" | grep .)
    mapfile -t entry < <(buildah inspect --format '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}' "$id" | grep .)
    enter=(chroot "--userspec=$user" "$root" env -i --chdir=/app "${env[@]}")
    # shellcheck disable=SC2016  # expanded by the shell inside
    unshare --net --mount --pid --fork bash -euc 'root=$1; shift; ip link set lo up
        mount --bind "$root" "$root"; mount -o remount,bind,ro "$root"
        mount -t tmpfs tmpfs "$root/tmp"; mount -t proc proc "$root/proc"; mount --rbind /dev "$root/dev"
        exec "$@"' - "$root" "${enter[@]}" "${entry[@]}" &
    starter=$!
    until pid=$(pgrep --parent "$starter"); do kill -0 "$starter"; sleep 0.1; done
    inside() { nsenter --target "$pid" --net --mount --pid "${enter[@]}" "$@"; }
    is_there() { kill -0 "$starter" 2> /dev/null; }
    stop() { kill -TERM "$pid" && wait "$starter"; }
}

case ${ENGINE:-} in
    docker | podman)
        "$ENGINE" build "${FLAGS[@]}" --tag "$IMAGE" .
        start_in_a_container
        ;;
    buildah)
        buildah bud --format docker "${FLAGS[@]}" --tag "$IMAGE" .
        start_in_namespaces
        ;;
    *)
        echo "docker-check: needs docker, podman or buildah, and none of them works here" >&2
        exit 1
        ;;
esac
for ((second = 0; ; second++)); do
    inside "${PROBE[@]}" > /dev/null 2>&1 && break
    is_there || { echo "docker-check: the server has ended" >&2; exit 1; }
    ((second < ${START_S:-120})) || { echo "docker-check: not healthy after ${START_S:-120} s" >&2; exit 1; }
    sleep 1
done
inside python - < deploy/smoke.py
inside allattn generate --device cpu --max-new-tokens 8 "It was a dark" && echo
stop || { echo "docker-check: SIGTERM ended the server with status $?, not 0" >&2; exit 1; }
echo "docker-check: passed with $ENGINE"
