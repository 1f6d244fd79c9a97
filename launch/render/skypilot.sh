# From here on the script is the same for every run. SkyPilot runs it on every node at once; the first is Ray's head.

: "${RAY_AUTH_TOKEN:?launch with --secret RAY_AUTH_TOKEN; the token of Ray has to be the same on all nodes}"
export RAY_AUTH_MODE=token
unset RAY_ADDRESS RAY_AUTH_TOKEN_PATH
mapfile -t ips <<<"$SKYPILOT_NODE_IPS"
port=26379 # SkyPilot keeps a Ray of its own on 6380, which is left alone
join_s=600
name=node_$SKYPILOT_NODE_RANK
common=(--block "--num-cpus=$cpus" "--num-gpus=$gpus" --temp-dir=/tmp/paceline
    "--resources={\"$name\": 1}" --log-color=false)

if ((SKYPILOT_NODE_RANK > 0)); then
    until (: <"/dev/tcp/${ips[0]}/$port") 2>/dev/null; do
        if ((SECONDS > join_s)); then
            echo "paceline: $name: no Ray head answers at ${ips[0]}:$port after $join_s s" >&2
            exit 4
        fi
        sleep 2
    done
    # It ends when the head is gone, or with its node. What the job comes to is the head's to say.
    ray start "--address=${ips[0]}:$port" "${common[@]}" || true
    exit 0
fi

ray start --head "--node-ip-address=${ips[0]}" "--port=$port" --include-dashboard=false \
    --ray-client-server-port=26380 "${common[@]}" &
ray_pid=$!
trap 'kill -TERM "$ray_pid" 2>/dev/null || true; wait "$ray_pid" || true' EXIT
export RAY_ADDRESS="${ips[0]}:$port"
mapfile -t names < <(seq --format=node_%.0f 0 $((nodes - 1)))
python -m launch.joined --within "$join_s" "${names[@]}"

if [[ -e $run/config/resolved.yaml ]]; then
    paceline resume "$run" "${overrides[@]}"
else
    paceline train "$state/recipe.yaml" "${overrides[@]}"
fi
