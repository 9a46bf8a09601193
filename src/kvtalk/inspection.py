"""A packet for people to look at."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from kvtalk.packet import Packet


def as_dict(packet: Packet) -> dict[str, Any]:
    """Manifest, sizes and derived figures."""
    sections = packet.layout.section_sizes()
    return {
        "bytes": packet.size,
        "overhead_bytes": packet.size - sum(sections.values()),
        "context_tokens": packet.manifest.end - packet.manifest.start,
        "bits_per_value": None if packet.manifest.adapter else round(bits_per_covered_value(packet), 4),
        "layers_sent": packet.layout.sent_layers,
        "sections": sections,
        "manifest": packet.manifest.model_dump(),
    }


def bits_per_covered_value(packet: Packet) -> float:
    """The packet's bits over the values of the context's whole cache in the layers that the packet covers."""
    tokens = packet.manifest.end - packet.manifest.start
    values = sum(2 * layer.kv_heads * layer.head_dim * tokens for layer in packet.layout.layers)
    return 8 * packet.size / max(values, 1)


def table(packet: Packet) -> Table:
    """The same as a table."""
    manifest, sections = packet.manifest, packet.layout.section_sizes()
    tokens = manifest.end - manifest.start
    shown = Table("", "", title=f"kvtalk packet, part {manifest.part[0]} of {manifest.part[1]}", show_header=False)
    shown.add_row("size", f"{packet.size:,} bytes ({packet.size - sum(sections.values())} of them overhead)")
    if manifest.adapter:
        width = packet.layout.layers[0].head_dim
        shown.add_row("latents", f"{manifest.longest} of {width} numbers, {packet.size / tokens:.1f} bytes a token")
        shown.add_row("adapter", manifest.adapter)
    else:
        shown.add_row("bits per value", f"{bits_per_covered_value(packet):.3f}")
    shown.add_row("context", f"{tokens} tokens, positions {manifest.start} to {manifest.end - 1}")
    if not manifest.adapter:
        shown.add_row("kept", f"at most {manifest.longest} tokens a layer")
    sent = packet.layout.sent_layers
    shown.add_row("layers", f"{len(sent)} of {manifest.covers[2]} ({_ranges(sent)})")
    used = sorted({(layer.keys, layer.values) for layer in packet.layout.layers if layer.kept})
    shown.add_row("codecs", "; ".join(f"keys {keys}, values {values}" for keys, values in used))
    shown.add_row("keys", "rotated (after RoPE)" if manifest.rotated else "not rotated (before RoPE)")
    shown.add_row("sections", "\n".join(f"{name}: {size:,}" for name, size in sections.items()))
    model = packet.fingerprint
    shown.add_row("model", f"{model.arch}, geometry {model.geometry}, rope {model.rope}")
    shown.add_row("", f"tokenizer {model.tokenizer}, weights {model.weights}")
    return shown


def _ranges(indices: list[int]) -> str:
    """``0-3, 5`` for ``[0, 1, 2, 3, 5]``."""
    texts: list[str] = []
    for index in indices:
        if texts and int(texts[-1].split("-")[-1]) == index - 1:
            texts[-1] = f"{texts[-1].split('-')[0]}-{index}"
        else:
            texts.append(str(index))
    return ", ".join(texts)
