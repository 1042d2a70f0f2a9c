# shellcheck shell=bash
# shellcheck disable=SC2034  # `words` is used by the scripts that source this file
# What the steps of action.yml share. Texts of dsd-refine come from models and data of others, so they must not be
# taken for commands of the runner.

# An empty token is not the same as none: the library would send it.
if [ -z "${HF_TOKEN:-}" ]; then unset HF_TOKEN; fi

# Put each word of a text, quoted as in a shell, into the array `words`. Nothing in the text is expanded or run.
split() {
  words=()
  local listed
  listed=$(mktemp)
  if ! python -c 'import shlex, sys; [sys.stdout.write(word + "\0") for word in shlex.split(sys.argv[1])]' "$1" > "$listed" 2> /dev/null; then
    annotate error "the input is not quoted as in a shell: $1"
    exit 2
  fi
  mapfile -d '' -t words < "$listed"
}

# Run a command whose lines are not taken for commands of the runner. What it writes to stderr is also kept in $errors.
safely() {
  local token code=0
  token=$(python -c 'import secrets; print(secrets.token_hex(16))')
  errors=$(mktemp)
  echo "::stop-commands::$token"
  { "$@" 2>&1 >&3 | tee "$errors" >&2; } 3>&1 || code=$?
  echo "::$token::"
  return "$code"
}

# Show a message at the top of the job: annotate error|warning|notice MESSAGE
annotate() {
  local text=$2
  text=${text//'%'/%25}
  text=${text//$'\r'/%0D}
  text=${text//$'\n'/%0A}
  echo "::$1 title=dsd-refine::$text"
}

# The error message of the last command, without progress and news.
message() {
  local text
  text=$(sed -n '/^Error: /,$p' "$errors" | sed 's/^Error: //' | head -c 2000)
  echo "${text:-$(tail -n 5 "$errors" | head -c 2000)}"
}
