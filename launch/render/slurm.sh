# From here on the script is the same for every run. It runs on the first node of the job, which is Ray's head.

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export state gpus cpus nodes
export token="$state/ray_token.$SLURM_JOB_ID"
export success="$state/SUCCESS" ray_logs="$state/ray-$SLURM_JOB_ID"
export scratch="${TMPDIR:-/tmp}/paceline-$SLURM_JOB_ID" # short: Ray's sockets must fit 107 characters
export join_s=300
end_s=300 # to end Ray in, on nodes that other work slows down
ray_pids=()
joined_pid='' train_pid='' told=''

say() { echo "paceline: $*" >&2; }

end_ray() {
    local pid deadline=$((SECONDS + end_s))
    rm -f "$token"
    for pid in "${ray_pids[@]}"; do
        while ((SECONDS < deadline)) && kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
        kill -TERM "$pid" 2>/dev/null || true # a node that lags: Slurm ends its processes
        wait "$pid" 2>/dev/null || true
    done
    ray_pids=()
    rm -rf "$scratch-${hosts[0]}" # what a node that was killed could not remove
}

# The end of the job, however it comes: Ray is stopped, the token is gone.
trap end_ray EXIT
job_is_running() { [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; }
leave() {
    trap - TERM
    if (($1 == 75)); then end_s=30; fi # the job must queue itself again before its time is up
    end_ray
    if (($1 == 75)) && job_is_running; then
        say "queued again to go on"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$1"
}
# Slurm warns of its time limit, and of preemption where the cluster sends the user's signal then: the run saves and
# exits with 75, as does a job that has not come to train. A job that is no longer running was cancelled, and its Ray
# with it: nothing can be saved.
# shellcheck disable=SC2329  # the trap calls it
on_term() {
    told=yes
    if ! job_is_running; then
        say "ended by Slurm"
        if [[ -n $train_pid ]]; then kill -KILL "$train_pid" 2>/dev/null || true; fi
        exit 143
    fi
    if [[ -z $train_pid ]]; then
        say "told to stop before training has begun"
        if [[ -n $joined_pid ]]; then kill "$joined_pid" 2>/dev/null || true; fi
        leave 75
    fi
    say "told to stop: saving"
    kill -TERM "$train_pid" 2>/dev/null || true
    return 0 # a bare return would hand on the interrupted wait's code, and end the script
}
trap on_term TERM

# Only this job knows the token: the nodes read it from the shared folder, owner only. Where it goes, Ray goes.
rm -f "$success" "$token"
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token.partial"
mv "$token.partial" "$token"
unset RAY_AUTH_TOKEN RAY_ADDRESS
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"
export port=$((20000 + SLURM_JOB_ID % 5000 * 2)) # and the next; below what systems give out by themselves
read -r head_ip _ < <(hostname -I)
export head_ip

# A node of the cluster: Ray in the foreground, until the token is gone or Ray ends by itself.
# shellcheck disable=SC2329  # srun calls it
ray_node() {
    local role=$1 name=$SLURMD_NODENAME deadline=$((SECONDS + join_s)) where
    until [[ -s $token ]]; do
        if ((SECONDS > deadline)); then
            echo "paceline: node $name does not see $token: run.dir is not on storage that it shares" >&2
            return 1
        fi
        sleep 1
    done
    if [[ $role == head ]]; then
        where=(--head "--node-ip-address=$head_ip" "--port=$port" --include-dashboard=false
            "--ray-client-server-port=$((port + 1))")
    else
        where=("--address=$head_ip:$port")
    fi
    local folder="$scratch-$name" ray_pid code=0 told=''
    trap 'told=yes' TERM INT # the job is cancelled: everything in it is told at once
    mkdir -p "$folder"
    ray start --block "${where[@]}" "--num-cpus=$cpus" "--num-gpus=$gpus" \
        "--temp-dir=$folder" "--resources={\"slurm_$name\": 1}" --log-color=false >"$folder/start.log" 2>&1 &
    ray_pid=$!
    while [[ -z $told && -e $token ]] && kill -0 "$ray_pid" 2>/dev/null; do sleep 1 || true; done
    if [[ -z $told && -e $token ]]; then
        wait "$ray_pid" || code=$?
        echo "paceline: Ray ended on node $name with code $code:" >&2
        tail -n 20 "$folder/start.log" >&2
    else
        kill -TERM "$ray_pid" 2>/dev/null || true
        wait "$ray_pid" || true
    fi
    if [[ ! -e $success ]]; then
        mkdir -p "$ray_logs"
        cp -r "$folder/session_latest/logs" "$ray_logs/$name" 2>/dev/null || true # none where Ray never started
    fi
    rm -rf "$folder"
    return "$code"
}
export -f ray_node

start_node() {
    srun --overlap --nodes=1 --ntasks=1 --cpus-per-task="$cpus" --nodelist="$2" --export=ALL \
        bash -c "ray_node $1" &
    ray_pids+=("$!")
}

start_node head "${hosts[0]}"
for host in "${hosts[@]:1}"; do start_node worker "$host"; done

export RAY_ADDRESS="$head_ip:$port"
python -m launch.joined --within "$join_s" "${hosts[@]/#/slurm_}" &
joined_pid=$!
code=0
wait -n "$joined_pid" "${ray_pids[@]}" || code=$?
if kill -0 "$joined_pid" 2>/dev/null; then
    kill "$joined_pid" 2>/dev/null || true
    say "Ray ended on a node before all had joined; its words are above"
    exit 4
fi
if ((code)); then exit "$code"; fi

if [[ -e $run/config/resolved.yaml ]]; then
    paceline resume "$run" "${overrides[@]}" &
else
    paceline train "$state/recipe.yaml" "${overrides[@]}" &
fi
train_pid=$!
code=143
while ((code == 143)); do
    code=0 told=''
    wait "$train_pid" || code=$?
    [[ -n $told ]] || break # a signal ended the wait, not the training: what that comes to is still to be had
done

if ((code == 0)); then
    printf 'job %s\nrun %s\n' "$SLURM_JOB_ID" "$run" >"$success.partial"
    mv "$success.partial" "$success"
fi
leave "$code"
