"""Which environment variables reach the ranks of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from hynb.config import Config
from hynb.errors import ClusterError

# What the launching process has of these goes to the ranks of all hosts, as it would on one.
_FORWARDED = ("NCCL_", "GLOO_", "TORCH_", "UCX_", "HF_HOME", "CUDA_HOME", "DS_SKIP", "OMP_NUM_THREADS")
# What programs need to run on this machine: the login, languages, Python, compilers, devices, libraries, schedulers.
_INHERITED = (
    *(
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "PATH",
        "PWD",
        "TERM",
        "LANG",
        "LC_",
        "TZ",
        "TMPDIR",
        "TEMP",
        "TMP",
        "XDG_",
    ),
    *("PYTHON", "VIRTUAL_ENV", "CONDA_", "PYENV_", "COVERAGE", "LD_", "LIBRARY_PATH", "CPATH", "CC", "CXX", "CFLAGS"),
    *(
        "CXXFLAGS",
        "LDFLAGS",
        "MAX_JOBS",
        "NINJA",
        "CUDA",
        "NVIDIA_",
        "NVML",
        "ROCM",
        "HIP_",
        "NVTE_",
        "CUBLAS",
        "CUDNN",
    ),
    *("NCCL_", "GLOO_", "UCX_", "UCC_", "FI_", "IBV_", "MLX", "RDMA", "TORCH", "PYTORCH_", "TRITON", "TP_SOCKET"),
    *("DS_", "DEEPSPEED", "ACCELERATE_", "TRANSFORMERS_", "TOKENIZERS_", "HF_", "PEFT_", "BNB_", "TENSORBOARD_"),
    *("OMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "GOMP_", "MALLOC_", "HYNB_", "PDSH_", "SSH_AUTH_SOCK"),
    *("MASTER_", "SLURM_", "PMI", "PMIX", "OMPI_", "MPI", "I_MPI_", "HYDRA_", "KUBERNETES_", "FAKETIME", "DBUS_"),
)
# Names whose value is not for programs that have no use for it, nor for files, logs and command lines.
_SECRET = re.compile(
    r"SECRET|PASSWORD|PASSWD|CREDENTIAL|(TOKEN|KEY)S?(_|$)|(^|_)(PASS|PWD|AUTH|JWT)(_|$)", re.IGNORECASE
)
# A socket, not what it protects, and folders.
_NO_SECRETS = {"SSH_AUTH_SOCK", "PWD", "OLDPWD"}


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that the supervisor, its launcher and the ranks on this machine inherit from who launches a run.

    Others reach them when the user names them in .deepspeed_env.
    """
    return {name: value for name, value in environment.items() if name.startswith(_INHERITED) and not is_secret(name)}


def is_secret(name: str) -> bool:
    """Whether the name of a variable says that its value is a secret."""
    return _SECRET.search(name) is not None and name not in _NO_SECRETS


def rank_environment(config: Config, environment: dict[str, str]) -> dict[str, str]:
    """The variables of the ranks on every host: the user's .deepspeed_env, the forwarded ones and ours.

    Raises:
        ClusterError: a line of a .deepspeed_env is not NAME=VALUE.
    """
    given = os.environ.items()
    values = {name: value for name, value in given if name.startswith(_FORWARDED) and not is_secret(name)}
    named = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for path in dict.fromkeys((Path.home() / named, Path.cwd() / named)):
        if path.is_file():
            values |= _read_environment(path)
    if config.network_interface is not None:
        values |= {name: config.network_interface for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")}
    if "OMP_NUM_THREADS" in values:
        environment = environment | {"OMP_NUM_THREADS": values["OMP_NUM_THREADS"]}
    return values | environment


def _read_environment(path: Path) -> dict[str, str]:
    values, problems = {}, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip().removeprefix("export ")
        if not text or text.startswith("#"):
            continue
        name, sign, value = text.partition("=")
        if not sign or not re.fullmatch(r"[A-Za-z_]\w*", name.strip()):
            # Without the line, whose value may be a secret.
            problems.append(f"{path}:{number}: is not NAME=VALUE, with a name of letters, digits and _")
        values[name.strip()] = value.strip()
    if problems:
        raise ClusterError(problems)
    return values
