"""What cards can do by their data sheets. Nothing is measured. Help texts show the names: no import of JAX."""

import dataclasses

# Stated, not measured: what each collective takes, however few bytes it sends.
COLLECTIVE_US = 10.0  # within a host
HOST_COLLECTIVE_US = 30.0  # what hosts add


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """Peak rates of one device.

    Attributes:
      memory_gb: in 10^9 bytes. Vendors print 2^30 as GB; the difference is left to the driver and the runtime.
      memory_gb_per_s: of memory.
      tflops: dense matrix products of 16-bit floats.
      link_gb_per_s: to the other cards of its host, in one direction: all its links together, or the narrowest of a
        ring where cards are not all connected.
      host_link_gb_per_s: to other hosts, in one direction: the card's share of the network ports.
    """

    name: str
    memory_gb: float
    memory_gb_per_s: float
    tflops: float
    link_gb_per_s: float
    host_link_gb_per_s: float


# The most common card of each architecture. Sources: the vendors' data sheets of the cards; those of their servers
# (AMD Instinct platforms, DGX A100 and H100, Frontier's nodes) for network ports, where cards of workstations are
# taken to share nothing but one port of 100 Gb/s each.
CARDS = {
    # one of its two dies; a link of 50 GB/s is the narrowest of a ring of dies
    "gfx90a": Card(
        name="MI250X, one die",
        memory_gb=64,
        memory_gb_per_s=1638,
        tflops=191.5,
        link_gb_per_s=50,
        host_link_gb_per_s=12.5,
    ),
    # seven links of 64 GB/s in each direction
    "gfx942": Card(
        name="MI300X",
        memory_gb=192,
        memory_gb_per_s=5300,
        tflops=1307.4,
        link_gb_per_s=448,
        host_link_gb_per_s=50,
    ),
    # seven links of 76.8 GB/s in each direction
    "gfx950": Card(
        name="MI355X",
        memory_gb=288,
        memory_gb_per_s=8000,
        tflops=2516.6,
        link_gb_per_s=537.6,
        host_link_gb_per_s=50,
    ),
    # PCIe 4.0 x16
    "gfx1100": Card(
        name="RX 7900 XTX",
        memory_gb=24,
        memory_gb_per_s=960,
        tflops=122.8,
        link_gb_per_s=31.5,
        host_link_gb_per_s=12.5,
    ),
    # PCIe 5.0 x16. AMD states 191 TFLOPS and 640 GB/s on the card's product page, seen only as quoted by others; it is
    # 64 compute units of 1,024 operations a cycle at 2.92 GHz
    "gfx1201": Card(
        name="AI PRO R9700",
        memory_gb=32,
        memory_gb_per_s=640,
        tflops=191.4,
        link_gb_per_s=63,
        host_link_gb_per_s=12.5,
    ),
    "sm_80": Card(
        name="A100 SXM",
        memory_gb=80,
        memory_gb_per_s=2039,
        tflops=312,
        link_gb_per_s=300,
        host_link_gb_per_s=25,
    ),
    "sm_90": Card(
        name="H100 SXM",
        memory_gb=80,
        memory_gb_per_s=3350,
        tflops=989.4,
        link_gb_per_s=450,
        host_link_gb_per_s=50,
    ),
    # Not seen: NVIDIA's data sheet. Memory, links (18 of NVLink 5, 14.4 TB/s for eight cards in both directions) and
    # ports (eight of 400 Gb/s) are those of B200 systems in mlcommons/inference_results_v6.0; bandwidth: "NVIDIA HGX
    # B200 Hardware Overview" at docs.vultr.com/inference-cookbook; TFLOPS without sparsity, of a card with 1,000 W:
    # glennklockwood.com/garden/processors/B200
    "sm_100": Card(
        name="B200",
        memory_gb=180,
        memory_gb_per_s=8000,
        tflops=2250,
        link_gb_per_s=900,
        host_link_gb_per_s=50,
    ),
}
