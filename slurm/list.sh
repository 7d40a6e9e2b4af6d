# Sourced by the array jobs: one line of a list for each task.

# read_line_of LIST   Sets `words` to the words of line number SLURM_ARRAY_TASK_ID, which counts from 1 and leaves out
# empty lines and comments. Quotes hold words together; nothing is expanded or run.
read_line_of() {
  local line
  line=$(grep -v -e '^[[:space:]]*$' -e '^[[:space:]]*#' "$1" | sed -n "${SLURM_ARRAY_TASK_ID}p")
  [ -n "$line" ] || { echo "error: $1 has no line $SLURM_ARRAY_TASK_ID; submit with --array=1-N" >&2; exit 2; }
  mapfile -t words < <(xargs -n 1 printf '%s\n' <<< "$line")
  echo "line $SLURM_ARRAY_TASK_ID of $1: ${words[*]}"
}
