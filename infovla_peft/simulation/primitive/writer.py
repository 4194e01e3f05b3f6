"""Things and arenas to MuJoCo XML, in the layout that LIBERO and robosuite expect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from .shapes import IDENTITY, Body, Part, Site, Thing

# The contact parameters of LIBERO's objects: stiff, high friction (so that a thin rim can be pinched).
_CONTACT = {"solimp": "0.998 0.998 0.001", "solref": "0.001 1", "friction": "0.95 0.3 0.1"}


def numbers(*values: float) -> str:
    """Numbers for an XML attribute, rounded to 10 nm, so that a file does not depend on the platform's last bit."""
    return " ".join(f"{round(value, 8) + 0.0:.10g}" for value in values)


def render(root: Element) -> str:
    """The XML text of a tree."""
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def add_geom(parent: Element, part: Part, attributes: Mapping[str, str]) -> None:
    """Append one geom; robosuite reads group 0 as collision shape and group 1 as picture."""
    pose = {"pos": numbers(*part.position)}
    if part.rotation != IDENTITY:
        pose["quat"] = numbers(*part.rotation)
    SubElement(parent, "geom", {"type": part.kind, "size": numbers(*part.size), **pose, **attributes})


def picture(part: Part) -> dict[str, str]:
    """Attributes of a geom that is drawn and neither collides nor weighs."""
    return {"contype": "0", "conaffinity": "0", "mass": "0", "group": "1", "rgba": numbers(*part.colour, 1.0)}


def _parts(body: Body) -> Iterator[Part]:
    yield from body.parts
    for child in body.bodies:
        yield from _parts(child)


def _add_site(parent: Element, site: Site) -> None:
    colour = (0.0, 0.0, 0.0, 0.0) if site.colour is None else (*site.colour, 1.0)
    attributes = {"name": site.name, "type": site.kind, "pos": numbers(*site.position), "size": numbers(*site.size)}
    SubElement(parent, "site", {**attributes, "quat": numbers(*site.rotation), "group": "0", "rgba": numbers(*colour)})


def add_body(parent: Element, body: Body, density: float) -> None:
    """Append a body and what hangs on it; `density` (kg/m³) of its solid parts."""
    element = SubElement(parent, "body", {"name": body.name, "pos": numbers(*body.position)})
    if body.rotation != IDENTITY:
        element.set("quat", numbers(*body.rotation))
    if body.mass is not None:
        SubElement(element, "inertial", {"pos": "0 0 0", "mass": numbers(body.mass), "diaginertia": "1 1 1"})
    if body.joint is not None:
        joint = body.joint
        attributes = {"name": joint.name, "type": joint.kind, "axis": numbers(*joint.axis)}
        attributes |= {"pos": numbers(*joint.position), "limited": "true", "range": numbers(*joint.range)}
        attributes |= {"damping": numbers(joint.damping), "frictionloss": numbers(joint.frictionloss)}
        SubElement(element, "joint", attributes)
    for site in body.sites:
        _add_site(element, site)
    for part in body.parts:
        if part.solid:
            solid = {"group": "0", "density": numbers(density), "rgba": numbers(*part.colour, 1.0)}
            add_geom(element, part, {**solid, **_CONTACT})
        if part.shown:
            add_geom(element, part, picture(part))
    for child in body.bodies:
        add_body(element, child, density)


def thing_xml(thing: Thing) -> str:
    """The XML text of an object or fixture."""
    name = thing.file.rsplit("/", 1)[-1].removesuffix(".xml")
    root = Element("mujoco", {"model": name})
    SubElement(root, "compiler", {"angle": "radian"})
    SubElement(root, "asset")
    outer = SubElement(SubElement(root, "worldbody"), "body")
    volume = sum(part.volume() for part in _parts(thing.body) if part.solid)
    add_body(outer, thing.body, thing.density if thing.mass is None else thing.mass / volume)
    for site, position in (
        ("bottom_site", (0.0, 0.0, thing.bottom)),
        ("top_site", (0.0, 0.0, thing.top)),
        ("horizontal_radius_site", (thing.radius, thing.radius, 0.0)),
    ):
        SubElement(outer, "site", {"name": site, "pos": numbers(*position), "size": "0.005", "rgba": "0 0 0 0"})
    return render(root)
