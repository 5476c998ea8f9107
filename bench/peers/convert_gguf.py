"""Write a GGUF file again with its matrices in another storage type, so that each peer gets the form it runs fastest.

The values are those of the source file, dequantised, then rounded to the new type (f16, bf16, f32) or quantised again
(q8_0). Metadata is copied. Usage: convert_gguf.py IN.gguf OUT.gguf {f16,bf16,f32,q8_0}
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf

FILE_TYPE_BY_NAME = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def convert(source: Path, target: Path, kind: str) -> None:
    """Write `target` beside its final place first, so that an interrupted run leaves no half file."""
    reader = gguf.GGUFReader(source)
    unfinished = target.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, arch="llama")
    _copy_metadata(reader, writer, FILE_TYPE_BY_NAME[kind])
    quantization = gguf.GGMLQuantizationType[kind.upper()]
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        stored = quantization if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(target)


def _copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, file_type: gguf.LlamaFileType) -> None:
    written_by_writer = ("general.architecture", "general.file_type", "general.quantization_version")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in written_by_writer:
            continue
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
    writer.add_file_type(file_type)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
