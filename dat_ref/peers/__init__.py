"""The systems that deformable attention is compared with; the backbones use two of them in their local blocks."""
