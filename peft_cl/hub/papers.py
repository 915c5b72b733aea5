"""The papers of the methods, as a model card presents and cites them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A method in a paragraph, and where it was published.

    Attributes:
        description: What the method does, in a paragraph of Markdown.
        key: BibTeX key.
        title: Title of the paper.
        authors: Authors in BibTeX's form, "Family, Given and Family, Given".
        venue: Proceedings it appeared in.
        year: Year of the proceedings.
        arxiv: arXiv number, for example "2112.08654".
    """

    description: str
    key: str
    title: str
    authors: str
    venue: str
    year: int
    arxiv: str

    @property
    def link(self) -> str:
        """Markdown link: first author, year, and the paper's title."""
        return f"{self.authors.split(',')[0]} et al. ({self.year}), [{self.title}](https://arxiv.org/abs/{self.arxiv})"

    @property
    def bibtex(self) -> str:
        """The paper as a BibTeX entry."""
        fields = {
            "title": f"{{{self.title}}}",  # the second pair of braces keeps capitals
            "author": self.authors,
            "booktitle": self.venue,
            "year": str(self.year),
            "eprint": self.arxiv,
            "archiveprefix": "arXiv",
        }
        lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@inproceedings{{{self.key},\n{lines}\n}}"


CVPR = "Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)"

# By PEFT type. A method that is not here gets a general description; `model_card(paper=...)` gives it its own.
PAPERS = {
    "L2P": Paper(
        description=(
            "L2P (Learning to Prompt) leaves the backbone frozen and learns a small pool of prompts, each with a key. "
            "The frozen backbone's own feature of the image is the query: the prompts whose keys are most similar to "
            "it (cosine) join the image's tokens, and a head over the classes seen so far reads the result. The keys "
            "are pulled towards the queries that chose them. Images of earlier tasks are not kept, and the task of an "
            "image need not be known."
        ),
        key="wang2022l2p",
        title="Learning to Prompt for Continual Learning",
        authors=(
            "Wang, Zifeng and Zhang, Zizhao and Lee, Chen-Yu and Zhang, Han and Sun, Ruoxi and Ren, Xiaoqi and "
            "Su, Guolong and Perot, Vincent and Dy, Jennifer and Pfister, Tomas"
        ),
        venue=CVPR,
        year=2022,
        arxiv="2112.08654",
    ),
    "DUALPROMPT": Paper(
        description=(
            "DualPrompt leaves the backbone frozen and learns two kinds of prompts: a general one (G-prompt), trained "
            "in every task and shared by all, and an expert one per task (E-prompt) with a key. They enter different "
            "layers of the backbone, as additional keys and values of the attention. In training the task's own "
            "E-prompt is used; at test time the one whose key is most similar (cosine) to the frozen backbone's "
            "feature of the image. Images of earlier tasks are not kept, and the task of an image need not be known."
        ),
        key="wang2022dualprompt",
        title="DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning",
        authors=(
            "Wang, Zifeng and Zhang, Zizhao and Ebrahimi, Sayna and Sun, Ruoxi and Zhang, Han and Lee, Chen-Yu and "
            "Ren, Xiaoqi and Su, Guolong and Perot, Vincent and Dy, Jennifer and Pfister, Tomas"
        ),
        venue="European Conference on Computer Vision (ECCV)",
        year=2022,
        arxiv="2204.04799",
    ),
    "CODAPROMPT": Paper(
        description=(
            "CODA-Prompt leaves the backbone frozen and learns prompt components, each with a key and an attention "
            "vector. An image's prompt is the sum of all components, weighted by how well the frozen backbone's "
            "feature of the image, seen through a component's attention vector, agrees with its key (cosine): no "
            "discrete choice, so everything is trained end to end. Each task adds components and freezes those of "
            "earlier tasks. Images of earlier tasks are not kept, and the task of an image need not be known."
        ),
        key="smith2023coda",
        title=("CODA-Prompt: COntinual Decomposed Attention-based Prompting for Rehearsal-Free Continual Learning"),
        authors=(
            "Smith, James Seale and Karlinsky, Leonid and Gutta, Vyshnavi and Cascante-Bonilla, Paola and "
            "Kim, Donghyun and Arbelle, Assaf and Panda, Rameswar and Feris, Rogerio and Kira, Zsolt"
        ),
        venue=CVPR,
        year=2023,
        arxiv="2211.13218",
    ),
}
