"""Transfer of tensors between a TensorFlow checkpoint and a safetensors file, in a process without PyTorch.

Run as a program: ``tensorflow_process.py read PREFIX FILE`` or ``tensorflow_process.py write PREFIX FILE``.
"""

import sys

import numpy as np
import tensorflow as tf
from safetensors.numpy import load_file, save_file


def main(action: str, prefix: str, file: str) -> None:
    """Write the checkpoint's tensors into the file, or the file's tensors into the checkpoint."""
    if action == "read":
        reader = tf.train.load_checkpoint(prefix)
        # TensorFlow returns a tensor without dimensions as a number.
        save_file({name: np.asarray(reader.get_tensor(name)) for name in reader.get_variable_to_shape_map()}, file)
    else:
        tensors = load_file(file)
        tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=list(tensors),
            shape_and_slices=[""] * len(tensors),
            tensors=[tf.constant(tensor) for tensor in tensors.values()],
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
