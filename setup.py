"""Builds what fastvae/binaries.py tells of: kernels, a pybind11 module, autograd's nodes.

FASTVAE_CUDA=0|1 leaves the CUDA kernels out or demands them (unset: built if nvcc is found).
FASTVAE_PARTS="_C _nodes" builds these alone, of libfastvae, _C and _nodes (unset: all).
FASTVAE_REQUIRE_EXT=1 makes it an error that nothing can be compiled (unset: install without).
TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX and MAX_JOBS mean what they mean to PyTorch.
"""

import os, platform, re, runpy, sys, sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import getoutput, getstatusoutput

import pybind11, torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ARCHS = ("8.0", "9.0", "10.0", "12.0")  # 8.0 serves 8.6 and 8.9 too
X86 = ["-DFASTVAE_X86"] if platform.machine().lower() in ("x86_64", "amd64") else []
binaries = runpy.run_path("fastvae/binaries.py")
SUFFIX, NODES = binaries["SUFFIX"], binaries["nodes_file"](torch.__version__)
FLAGS = ["-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-g0"]
FLAGS += ["-fno-trapping-math"]  # 10 % faster
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{x}" for x in ("f", "dq", "bw", "vl")), "-mprefer-vector-width=512"]
# Of gcc's own header, https://gcc.gnu.org/PR105593
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
ISAS = {"avx2": AVX2, "avx512": AVX512} if X86 else {}
FILE_FLAGS = {f"{isa}{part}": ISAS[isa] for part in ("", "_log_sums") for isa in ISAS}
APART = [*FILE_FLAGS, "baseline", "baseline_log_sums"] if X86 else []


class BuildExt(cpp_extension.BuildExtension):
    """Adds names, flags per file, and a build folder that outlives `pip install`, for rebuilds."""

    def get_ext_filename(self, fullname: str) -> str:
        path = super().get_ext_filename(fullname).replace(f"_nodes{SUFFIX}", NODES)
        return path.replace(f"libfastvae{SUFFIX}", "libfastvae.so")

    def run(self) -> None:
        folder = Path("." if self.inplace else self.build_lib)
        for old in folder.glob(f"fastvae/_nodes*{SUFFIX}"):  # another torch's, of earlier sources
            old.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        self.build_temp = f"build/{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

        def compile_file(name: str) -> list[str]:
            flags = {"cxx": ext.extra_compile_args["cxx"] + FILE_FLAGS[name]}
            options = (f"{self.build_temp}/{name}", ext.define_macros, ext.include_dirs)
            return self.compiler.compile([f"csrc/cpu/{name}.cpp"], *options, extra_postargs=flags)

        if ext.name == "fastvae.libfastvae":
            with ThreadPoolExecutor() as pool:
                ext.extra_objects += sum(pool.map(compile_file, FILE_FLAGS), [])
        super().build_extension(ext)


def find_nvcc() -> str | None:
    wish = os.environ.get("FASTVAE_CUDA") or "unset"
    toolkit = runpy.run_path("fastvae/cuda_toolkit.py")
    nvcc = None if wish == "0" else toolkit["find_nvcc"]()
    if wish not in ("unset", "0", "1") or (wish == "1" and not nvcc):
        sys.exit(f"FASTVAE_CUDA={wish}: want 0, or 1 with nvcc in CUDA_HOME, PATH or a pip package")
    print("fastvae: building for CPU", f"and CUDA with {nvcc}" if nvcc else "only, without nvcc")
    if not nvcc and wish == "unset" and toolkit["has_driver"]():
        print("fastvae: for the GPU, before building again:", toolkit["INSTALL"], flush=True)
    return nvcc


def kernels() -> Extension:
    cxx = ["-O3", *FLAGS, f'-DFASTVAE_TORCH_BUILT="{torch.__version__}"', *X86]
    cu = ["-O3", FLAGS[0], "-Xcompiler=" + ",".join(FLAGS[1:]), "--fmad=false", "-DUSE_CUDA"]
    cu += ["-Xfatbin=-compress-all"]  # a quarter of the size
    link = ["-Wl,--no-as-needed", "-ltorch"] * (sys.platform == "linux")  # leads to libtorch_cuda
    patterns = ("ops/*.cpp", "cpu/[!a]*.cpp")  # no avx
    sources = [path for pattern in patterns for path in Path("csrc").glob(pattern)]
    if nvcc := find_nvcc():
        # nvcc may be a wrapper script, so its toolkit is where it says, not where it lies.
        home = re.search("TOP=(.*)", getoutput(f"'{nvcc}' --dryrun -x cu /dev/null"))[1]
        version = re.search(r"release ([\d.]+)", getoutput(f"'{nvcc}' --version"))[1]
        known = getoutput(f"'{nvcc}' --list-gpu-arch").replace("compute_", "").split()
        archs = ";".join(a for a in ARCHS if a.replace(".", "") in known) + "+PTX"
        archs = os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or archs
        # BuildExtension wants nvcc to match torch's CUDA, and follows the headers of .cu files only
        # if torch has one. The stable ABI and the static CUDA runtime tie us to no torch's CUDA.
        cpp_extension.CUDA_HOME, torch.version.cuda = os.path.realpath(home), version
        cxx += ["-DUSE_CUDA", f'-DFASTVAE_CUDA="{version}"', f'-DFASTVAE_CUDA_ARCHS="{archs}"']
        link += [f"-L{home}/lib64", f"-L{home}/lib", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        sources += Path("csrc/cuda").glob("*.cu")
    library = cpp_extension.CppExtension(
        "fastvae.libfastvae",
        sorted(str(path) for path in sources if path.stem not in APART),
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],  # the oldest torch: 2.11
        extra_compile_args={"cxx": cxx, "nvcc": cu},
        extra_link_args=link,
    )
    library.libraries.remove("torch_python")
    return library


def extensions() -> list[Extension]:
    cxx = {"cxx": ["-O2", *FLAGS], "nvcc": []}
    include = [pybind11.get_include(), *cpp_extension.include_paths()]  # before torch's copy of it
    module = Extension("fastvae._C", ["csrc/module.cpp"], include, extra_compile_args=cxx)
    # Nodes of autograd's graph, which the stable ABI does not have: for this torch alone.
    sources = ["csrc/autograd/unity.cpp"]
    nodes = cpp_extension.CppExtension("fastvae._nodes", sources, extra_compile_args=cxx)
    parts = (os.environ.get("FASTVAE_PARTS") or "libfastvae _C _nodes").split()
    made = [kernels()] if "libfastvae" in parts else []
    return made + [ext for ext in (module, nodes) if ext.name.removeprefix("fastvae.") in parts]


os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # where pip puts ninja
(reason := Path("fastvae/_no_binary.txt")).unlink(missing_ok=True)  # for `python -m fastvae info`
compiler = f"{os.environ.get('CXX') or 'c++'} -I'{sysconfig.get_path('include')}' -std=c++20 -xc++"
failed, output = getstatusoutput(f"{compiler} -include Python.h -include span -E /dev/null")
if failed:
    problem = f"no C++20 compiler that finds Python's headers: {output}"
    if os.environ.get("FASTVAE_REQUIRE_EXT") == "1":
        sys.exit(f"fastvae: {problem}")
    reason.write_text(problem)
    print("!" * 80 + f"\nfastvae: NO KERNELS, only plain PyTorch: {problem}\n" + "!" * 80)
setup(ext_modules=[] if failed else extensions(), cmdclass={"build_ext": BuildExt})
