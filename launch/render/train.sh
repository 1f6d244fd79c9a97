# From here on the script is the same for every run: begin it, or go on with it. Ray is there; RAY_ADDRESS names it.

if [[ -e $run/config/resolved.yaml ]]; then
    exec paceline resume "$run" "${overrides[@]}"
fi
exec paceline train "$state/recipe.yaml" "${overrides[@]}"
