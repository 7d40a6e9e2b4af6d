# Sourced by the array jobs: one line of a list for each task.

# read_line_of LIST   Sets `words` to the words of line number SLURM_ARRAY_TASK_ID, which counts from 1 and leaves out
# empty lines and comments. Quotes hold words together; nothing is expanded or run.
read_line_of() {
  local number=${SLURM_ARRAY_TASK_ID:-0} line told
  line=$(grep -v -e '^[[:space:]]*$' -e '^[[:space:]]*#' "$1" | awk -v number="$number" 'NR == number')
  [ -n "$line" ] || { echo "error: $1 has no line $number; submit with --array=1-N" >&2; exit 2; }
  told=$(xargs -n 1 printf '%s\n' <<< "$line") || { echo "error: $1: quotes do not match: $line" >&2; exit 2; }
  mapfile -t words <<< "$told"
  echo "line $number of $1: ${words[*]}"
}
