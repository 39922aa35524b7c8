#!/usr/bin/env bash
# The one entry point: set up, check, test, train. `./launch.sh help` lists the commands.
# shellcheck disable=SC2329 # the exit at the end hides from it that main calls them all
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
VENV="${MINI_LLM_VENV:-$ROOT/.venv}"
[[ "$VENV" == /* ]] || VENV="$PWD/$VENV"
cd "$ROOT" # the Accelerate configs name the DeepSpeed ones relative to here

COMMANDS="setup quickstart test pretrain sft evaluate generate chat serve verify doctor help"
PYTHON_MINIMUM="3.11"
CONSTRAINTS="mini_llm/constraints.txt"
TORCH_VERSION="$(sed -n 's/^torch==//p' "$CONSTRAINTS")"
STAMP="$VENV/.mini_llm_setup" # what the finished set-up was made from; absent until it is finished
PIP_LOG="$VENV/setup.log"
TEST_PACKAGES="manpages-zh iproute2 tmux chromium-headless-shell" # Debian packages that tests need; without one its tests are skipped
CPU_BUILD_GB=3   # disk that a set-up takes with torch's CPU build
CUDA_BUILD_GB=10 # and with a CUDA build

# DeepSpeed's compiled extensions stay inside the repository: a lock that a killed run leaves in the
# shared default folder would hang every later start of every project.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$ROOT/.cache/torch_extensions}"

usage() {
  cat <<'TEXT'
Usage: ./launch.sh COMMAND [flags]

  setup        create .venv and install torch, the dependencies and this package (editable)
                 --dev               also the test, lint and type-check tools
                 --torch_index URL   take torch from this package index (default: pip's own settings)
  quickstart   set up, build a small corpus from text on this machine, pretrain and fine-tune on 2
               processes
  test         set up with --dev, then run the tests; every other flag goes to pytest
                 --slow              run the slow tests instead of the quick ones
  pretrain     train, on this machine or on several; recipe flags go to recipes/pretrain.py
  sft          fine-tune on conversations; recipe flags go to recipes/sft.py. Both take:
                 --config_file F     Accelerate config (default accelerate_configs/zero1.yaml)
                 --procs_per_node N  processes (default: one per GPU, 1 without a GPU)
                 --max_restarts N    after a failure, start again at most N times (default 0)
                 --print             print the command and exit
                 --help              all flags
               On several nodes: by SLURM's srun, or with one of
                 --hostfile F                              from one machine, by pdsh or ssh
                 --nodes N --node_rank R --main_ip IP      on every node
                 --nodes N --rendezvous_file PATH          on every node
  evaluate     CKPT: held-out bits per byte, perplexity by document length, multiple choice through
               lm-eval; a run folder, a checkpoint or any model that transformers opens
                 --text FILE         measure this text, not the held-out part of the run's data
                 --eval_data DIR     where C-Eval and CMMLU lie
                 --help              all flags
  generate     text from a model: ./launch.sh generate CKPT --prompt TEXT
                 CKPT                a run's folder, its final/ or a checkpoints/step-N, any stock
                                     checkpoint, or a hub id
                 --help              prompts from files or standard input, sampling, JSON
  chat         talk to a model in the terminal: ./launch.sh chat CKPT
                 --system TEXT       what the model is told first
  serve CKPT   OpenAI-compatible server of a run's model: chat, completions, models; on this machine
               alone unless --host says otherwise, which needs a key (--help: all flags)
  verify       on these ranks and nodes: versions, disk, compute, network, and whether every engine
               trains as one process does; takes the flags above for nodes and processes, and
                 --output_dir D      where checkpoints are going to be (default output/verify)
                 --max_minutes M     what does not fit is skipped, and said to be (default 10)
                 --skip PART         preflight or equivalence
  doctor       versions, devices, memory, and whether DeepSpeed starts on 2 processes
                 --data PATH         examine the data there instead: one shard through the pipeline
                 --tokenizer DIR, --seq_len N   for --data
  help         this text

Only setup, quickstart and test install anything. Relative paths start at the repository.
Environment: PYTHON (interpreter to build the environment with), MINI_LLM_VENV (default .venv).
TEXT
}

# ---------------------------------------------------------------- messages

die() { # the machine or the network is in the way
  echo "launch.sh: $*" >&2
  exit 1
}

usage_error() { # the command line is wrong
  echo "launch.sh: $*" >&2
  exit 2
}

note() { echo "launch.sh: note: $*" >&2; }

stage() { # stage NAME COMMAND…: run a command between two lines that say what and how long
  local name="$1" start=$SECONDS
  shift
  echo "[$name] started"
  "$@"
  echo "[$name] done in $((SECONDS - start)) s"
}

# ---------------------------------------------------------------- what this machine has

find_python() { # sets PYTHON_FOUND to an interpreter that can make the environment
  local candidate version too_old="" no_venv=""
  local candidates=(python3.13 python3.12 python3.11 python3)
  [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    version="$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" ||
      continue
    if ! at_least "$version" "$PYTHON_MINIMUM"; then
      too_old+="${too_old:+, }$candidate ($version)"
    elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      no_venv="$candidate ($version)"
    else
      PYTHON_FOUND="$candidate"
      return
    fi
  done
  local hint="then run this again, or name an interpreter: PYTHON=/path/to/python3 ./launch.sh setup"
  [[ -z "$no_venv" ]] ||
    die "$no_venv has no venv or ensurepip module; install it (Debian, Ubuntu: python3-venv), $hint"
  [[ -z "$too_old" ]] ||
    die "Python $PYTHON_MINIMUM or newer is needed, found only $too_old; install a newer one, $hint"
  die "no working Python found (tried ${candidates[*]}); install Python $PYTHON_MINIMUM or newer, $hint"
}

at_least() { # at_least 3.9 3.11: compare major.minor versions
  [[ "$1" =~ ([0-9]+)\.([0-9]+) ]] || return 1
  local major="${BASH_REMATCH[1]}" minor="${BASH_REMATCH[2]}"
  ((major > ${2%.*} || (major == ${2%.*} && minor >= ${2#*.})))
}

require_disk() { # require_disk GB WHAT: stop unless the disk of the environment has room for WHAT
  local folder="$VENV" free_kb used_kb=0
  while [[ ! -d "$folder" ]]; do folder="$(dirname "$folder")"; done
  free_kb="$(df -Pk "$folder" | awk 'NR == 2 {print $4}')"
  [[ ! -d "$VENV" ]] || used_kb="$(du -sk "$VENV" | cut -f1)" # an earlier set-up's share is paid
  ((free_kb + used_kb >= $1 * 1024 * 1024)) ||
    die "$2 needs about $1 GB, but $folder has $((free_kb / 1024 / 1024)) GB free;" \
      "free some space, or put the environment on another disk: MINI_LLM_VENV=/path ./launch.sh setup"
}

gpus_seen() { # one line "name, driver version" per NVIDIA GPU that may be used; nothing without one
  [[ "${CUDA_VISIBLE_DEVICES-unset}" != "" && "${CUDA_VISIBLE_DEVICES-unset}" != "-1" ]] || return 0
  command -v nvidia-smi >/dev/null || return 0
  local answer process tries status=0
  answer="$(mktemp)"
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$answer" 2>&1 &
  process=$!
  for ((tries = 0; tries < 600; tries++)); do
    kill -0 "$process" 2>/dev/null || break
    sleep 0.1
  done
  if kill -0 "$process" 2>/dev/null; then # not waited for: what hangs in the driver cannot be ended
    kill -KILL "$process"
    note "nvidia-smi is installed but did not answer within 60 s: the driver or a GPU hangs"
  elif wait "$process" || status=$?; ((status == 0)); then
    cat "$answer"
  else
    note "nvidia-smi is installed but finds no working GPU or driver: $(head -n 1 "$answer")"
  fi
  rm -f "$answer"
}

installed_torch() { # installed_torch __version__|cuda: of the environment's torch; empty without one
  local version_file
  for version_file in "$VENV"/lib/python3.*/site-packages/torch/version.py; do
    [[ ! -f "$version_file" ]] || sed -n "s/^$1[^=]*= *'\(.*\)'.*/\1/p" "$version_file"
  done
}

# ---------------------------------------------------------------- setup

fingerprint() { cksum | tr -d ' \t'; }

inputs_fingerprint() { cat pyproject.toml "$CONSTRAINTS" | fingerprint; }

is_set_up() { # is_set_up DEV TORCH_INDEX: does the environment hold what this set-up would make?
  [[ -x "$VENV/bin/python" ]] &&
    stamp_has "inputs=$(inputs_fingerprint)" &&
    stamp_has "root=$ROOT" && # the editable install names this folder,
    stamp_has "venv=$VENV" && # and the scripts of the environment that one
    { [[ "$1" == 0 ]] || stamp_has "dev=1"; } &&
    { [[ -z "$2" ]] || stamp_has "torch_index=$(fingerprint <<<"$2")"; }
}

stamp_has() { grep -qxF "$1" "$STAMP" 2>/dev/null; }

pip_install() { # pip_install ARGS…: output into the log; a failure names the package and stops
  local start_line what
  start_line="$(($(wc -l <"$PIP_LOG") + 1))"
  if PIP_USER=0 "$VENV/bin/python" -m pip install --no-input --disable-pip-version-check \
    --progress-bar off -c "$CONSTRAINTS" "$@" >>"$PIP_LOG" 2>&1; then
    return
  fi
  log_tail() { tail -n "+$start_line" "$PIP_LOG"; }
  if log_tail | grep -q 'No space left on device'; then
    die "the disk filled up during the installation; free some space or set TMPDIR and" \
      "PIP_CACHE_DIR to a larger disk (pip's output: $PIP_LOG)"
  fi
  what="$(log_tail | sed -n -e 's/.*No matching distribution found for \([^ ]*\).*/\1/p' \
    -e 's/.*Cannot install \([^ ]*\) because these package versions have conflicting.*/\1/p' | tail -n 1)"
  [[ -z "$what" ]] ||
    die "package $what cannot be had: pip's index is out of reach or has no build of it for this" \
      "machine; check the network and 'pip config list' (pip's output: $PIP_LOG)"
  what="$(log_tail | sed -n -e "s/.*Failed to build '*\([A-Za-z0-9_.-]*\).*/\1/p" \
    -e 's/.*Failed building \(editable\|wheel\) for \([^ ]*\).*/\2/p' | tail -n 1)"
  [[ -z "$what" ]] || die "package $what could not be built; see the end of pip's output: $PIP_LOG"
  what="$(log_tail | grep -i 'error' | tail -n 1 | sed 's/^ERROR: //')"
  die "pip failed: ${what:-no error line}; see its output: $PIP_LOG"
}

offered_torch() { # "VERSION CUDA" of the build that pip takes here; CUDA is "cpu" for the CPU build
  local report="$VENV/torch_report.json"
  pip_install --dry-run --quiet --ignore-installed --no-deps --report "$report" \
    "$@" "torch==$TORCH_VERSION"
  "$VENV/bin/python" - "$report" <<'PYTHON'
import json, platform, re, sys

metadata = json.load(open(sys.argv[1], encoding="utf-8"))["install"][0]["metadata"]
version, local = metadata["version"], metadata["version"].partition("+")[2]
cuda = "cpu"
if match := re.fullmatch(r"cu(\d+)(\d)", local):
    cuda = ".".join(match.groups())
elif not local and platform.system() == "Linux":
    # The build without a local version tells what it is by the CUDA libraries that it requires.
    for requirement in metadata.get("requires_dist", []):
        if match := re.match(r"(?:cuda-toolkit|nvidia-cuda-runtime)\S*?==(\d+\.\d+)", requirement):
            cuda = match.group(1)
print(version, cuda)
PYTHON
}

choose_torch() { # choose_torch [--index-url URL]: sets TORCH_BUILD, and says what and why
  local offer cuda gpus name driver needed
  TORCH_BUILD="$(installed_torch __version__)"
  if (($# == 0)) && [[ "${TORCH_BUILD%+*}" == "$TORCH_VERSION" ]]; then
    echo "Keeping the installed torch $TORCH_BUILD"
    return
  fi
  offer="$(offered_torch "$@")"
  read -r TORCH_BUILD cuda <<<"$offer"
  gpus="$(gpus_seen)"
  IFS=, read -r name driver <<<"${gpus%%$'\n'*}"
  driver="${driver# }"
  if [[ "$cuda" == cpu ]]; then
    if [[ -z "$gpus" ]]; then
      echo "No CUDA GPU found: installing torch $TORCH_BUILD (CPU build)"
    else
      echo "Found $name, but pip's index offers only a CPU build: installing torch $TORCH_BUILD (CPU build)"
      note "to train on the GPU: ./launch.sh setup --torch_index URL, with an index that has CUDA builds"
    fi
    return
  fi
  if [[ -z "$gpus" ]]; then
    echo "No CUDA GPU found, but pip's index offers only a CUDA build:" \
      "installing torch $TORCH_BUILD (CUDA $cuda build, runs on the CPU too)"
    note "about $((CUDA_BUILD_GB - CPU_BUILD_GB)) GB of disk are saved by" \
      "./launch.sh setup --torch_index URL, with an index that has CPU builds"
  else
    # The oldest Linux driver branch of each CUDA major version (minor versions are compatible).
    case "${cuda%%.*}" in
      12) needed=525 ;;
      13) needed=580 ;;
      *) needed=0 ;;
    esac
    ((${driver%%.*} >= needed)) ||
      die "the NVIDIA driver $driver of $name is too old for torch $TORCH_BUILD (CUDA $cuda needs" \
        "driver $needed or newer); update it, or set up with --torch_index URL of an index with" \
        "builds for an older CUDA, or with CUDA_VISIBLE_DEVICES= to train on the CPU"
    echo "Found $name (driver $driver): installing torch $TORCH_BUILD (CUDA $cuda build)"
  fi
  require_disk "$CUDA_BUILD_GB" "torch's CUDA build"
}

make_venv() { # an environment with a working pip; one that works is kept
  [[ ! -e "$VENV" || -f "$VENV/pyvenv.cfg" ]] ||
    die "$VENV exists and is not a Python environment; remove it or set MINI_LLM_VENV to another path"
  if "$VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
    { [[ ! -f "$STAMP" ]] || stamp_has "venv=$VENV"; }; then # its scripts break when it is moved
    echo "Environment: $VENV (pip's output: $PIP_LOG)"
    return
  fi
  find_python
  echo "Environment: $VENV, made with $PYTHON_FOUND (pip's output: $PIP_LOG)"
  "$PYTHON_FOUND" -m venv --clear "$VENV"
}

install_environment() { # install_environment DEV TORCH_INDEX
  local dev="$1" torch_index="$2" index_flags=() index_print extras="[all]"
  index_print="$(fingerprint <<<"$torch_index")"
  if stamp_has "dev=1"; then dev=1; fi # a changed pyproject must not take the tools away
  [[ -n "$torch_index" || ! -f "$STAMP" ]] || index_print="$(sed -n 's/^torch_index=//p' "$STAMP")"

  require_disk "$CPU_BUILD_GB" "the set-up"
  make_venv
  rm -f "$STAMP"
  : >"$PIP_LOG"
  pip_install --upgrade pip # old ones download whole wheels to answer --dry-run

  # torch goes first and alone, so that no other package can pull another build of it.
  [[ -z "$torch_index" ]] || index_flags=(--index-url "$torch_index")
  choose_torch ${index_flags[@]+"${index_flags[@]}"}
  pip_install --no-deps ${index_flags[@]+"${index_flags[@]}"} "torch===$TORCH_BUILD"

  [[ "$dev" == 0 ]] || extras="[dev]"
  echo "Installing the other packages and mini_llm$extras (a few minutes)"
  pip_install --editable ".$extras"

  printf '%s\n' "inputs=$(inputs_fingerprint)" "root=$ROOT" "venv=$VENV" "dev=$dev" \
    "torch_index=$index_print" >"$STAMP"
}

install_test_packages() { # where the package manager and the rights are there
  local package missing=() log="$VENV/test_packages.log"
  command -v apt-get >/dev/null && command -v dpkg-query >/dev/null || return 0
  for package in $TEST_PACKAGES; do
    [[ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" == installed ]] ||
      missing+=("$package")
  done
  ((${#missing[@]})) || return 0
  if [[ "$(id -u)" != 0 ]]; then
    note "some tests are skipped; to run them too: sudo apt-get install ${missing[*]}"
    return
  fi
  echo "Installing the Debian packages that tests need: ${missing[*]} (apt's output: $log)"
  apt_install() { DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"; }
  if apt_install "${missing[@]}" >"$log" 2>&1; then return; fi
  apt-get update >>"$log" 2>&1 || true # the next lines say what comes of it
  for package in "${missing[@]}"; do   # one by one: not every distribution has all of them
    apt_install "$package" >>"$log" 2>&1 ||
      note "$package cannot be had (apt's output: $log); the tests that need it are skipped"
  done
}

require_setup() {
  [[ -x "$VENV/bin/accelerate" ]] || usage_error "$1: nothing is installed yet; run ./launch.sh setup"
  export PATH="$VENV/bin:$PATH" # ninja, which builds extensions, is looked up there
}

# ---------------------------------------------------------------- commands

cmd_setup() {
  local dev=0 torch_index=""
  while (($#)); do
    case "$1" in
      --dev) dev=1 ;;
      --torch_index=?*) torch_index="${1#*=}" ;;
      --torch_index)
        [[ -n "${2:-}" ]] || usage_error "setup: --torch_index needs the URL of a package index"
        torch_index="$2"
        shift
        ;;
      *) usage_error "setup: unknown flag '$1' (it takes --dev and --torch_index URL)" ;;
    esac
    shift
  done
  if is_set_up "$dev" "$torch_index"; then
    echo "already set up: $VENV"
    ((dev == 0)) || install_test_packages
    return
  fi
  stage setup install_environment "$dev" "$torch_index"
  ((dev == 0)) || install_test_packages
  echo "Next: ./launch.sh quickstart, or ./launch.sh doctor to check this machine"
  echo "For commands that begin with accelerate or python: source $VENV/bin/activate"
}

cmd_test() {
  local marker="not slow" flags=() flag
  for flag in "$@"; do
    if [[ "$flag" == --slow ]]; then marker="slow"; else flags+=("$flag"); fi
  done
  is_set_up 1 "" || stage setup install_environment 1 ""
  install_test_packages
  require_setup test
  # Nothing may be fetched, and small ranks on few cores must not fight for threads.
  export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=1
  # Two files at a time: much of a launch is waiting. -n 0 runs them one after the other.
  exec "$VENV/bin/python" -m pytest -m "$marker" -n 2 --dist loadfile ${flags[@]+"${flags[@]}"}
}

cmd_quickstart() {
  (($# == 0)) || usage_error "quickstart: takes no flags, got '$1'; use ./launch.sh pretrain for your own run"
  local folder="output/quickstart" gpus threads processes=2 recipe
  is_set_up 0 "" || stage setup install_environment 0 ""
  require_setup quickstart
  gpus="$("$VENV/bin/python" -m mini_llm.launch gpus)"
  ((gpus != 1)) || processes=1
  # Without a GPU, spare each run DeepSpeed's warning that it looked for one.
  [[ "$gpus" != 0 || -n "$(installed_torch hip)" ]] || export DS_ACCELERATOR=cpu
  threads="${OMP_NUM_THREADS:-$(($(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) / processes))}"
  ((threads >= 1)) || threads=1
  ((threads <= 4)) || threads=4     # the model is too small to gain from more
  export OMP_NUM_THREADS="$threads" # the flag below is enough, but torchrun warns without it
  stage data "$VENV/bin/python" -m mini_llm.data.quickstart "$folder/data"
  for recipe in pretrain sft; do
    stage "$recipe" "$VENV/bin/accelerate" launch --config_file accelerate_configs/zero1.yaml \
      --num_processes "$processes" --main_process_port 0 \
      --num_cpu_threads_per_process "$threads" "recipes/$recipe.py"
  done
  cat <<TEXT

Where things are:
  $folder/data/                     corpus, tokenizer, packed rows and conversations
  $folder/pretrain/final/           the base model, a directory that plain transformers opens
  $folder/sft/final/                the chat model, likewise; sft/samples.txt has its answers
  $folder/*/metrics.jsonl           every logged step; plots/ and logs/ (TensorBoard) beside it
TEXT
}

cmd_pretrain() { launch_recipe pretrain "$@"; }

cmd_sft() { launch_recipe sft "$@"; }

cmd_generate() {
  require_setup generate
  exec "$VENV/bin/python" -m mini_llm.inference.generate "$@"
}

cmd_chat() {
  require_setup chat
  exec "$VENV/bin/python" -m mini_llm.inference.chat "$@"
}

cmd_verify() { launch_recipe verify "$@"; }

cmd_serve() {
  require_setup serve
  exec "$VENV/bin/python" -m mini_llm.inference.serve "$@"
}

launch_recipe() { # launch_recipe NAME FLAGS…: NAME under accelerate launch, here or on many nodes
  require_setup "$1"
  exec "$VENV/bin/python" -m mini_llm.launch "$@"
}

cmd_evaluate() {
  require_setup evaluate
  exec "$VENV/bin/python" -m mini_llm.evaluate "$@"
}

cmd_doctor() {
  require_setup doctor
  exec "$VENV/bin/python" -m mini_llm.doctor "$@"
}

main() {
  case "${1:-}" in
    setup | quickstart | test | pretrain | sft | evaluate | generate | chat | serve | verify | doctor)
      "cmd_$1" "${@:2}"
      ;;
    help | -h | --help) usage ;;
    "") usage_error "which command? One of: $COMMANDS" ;;
    *) usage_error "unknown command '$1'; it is one of: $COMMANDS" ;;
  esac
}

# One line with exit: bash reads a script as it goes, and this file may be edited meanwhile.
main "$@"; exit "$?"
