"""What compilers made of the kernels: registers, spills, instructions, and counts from a simulator. No timing.

* compile_report: the command, and the report on the Triton kernels, for the calls in workloads
* cuda_report: reports on the CUDA module, with the limits in cuda_marks
* cuda_module, sass: read PTX and machine code
* pipes: a model of which pipe of a GPU bounds a loop
* cuda_simulator: runs the CUDA module's kernels on CPU tensors
"""
