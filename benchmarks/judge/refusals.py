"""How a judge says that it will not judge, or that it was shown nothing, in the languages that judges answer in.

A pattern wants the refusal itself: somebody ("I", not the program that edits) who cannot or will not judge, or images
that were not handed over. So the reason of a bad grade ("I cannot see any change", "the hat is missing") is none. The
patterns read folded text: lower case, no accents on Latin, Greek and Cyrillic letters, plain apostrophes."""

from __future__ import annotations

import re
import unicodedata

APOSTROPHES = str.maketrans("’‘ʼ`´", "'''''")


def _without_accents(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text)
    return unicodedata.normalize("NFC", "".join(letter for letter in decomposed if not "\u0300" <= letter <= "\u036f"))


def folded(text: str) -> str:
    """Lower case without accents, apostrophes and spaces made plain."""
    return " ".join(_without_accents(text.translate(APOSTROPHES).casefold()).split())


# --- English ----------------------------------------------------------------------------------------------------------

SORRY = r"""(?:[^.!?"]{0,12}\b(?:sorry|apologies|unfortunately)\b\W*(?:but )?)?"""
SPEAKER = rf"""(?:\b(?:i|we)\b[^.!?]{{0,40}}?|(?:^|[.!?:"] ?){SORRY})"""
NOT = (
    r"\b(?:can ?not|can't|could not|couldn't|won't|will not|(?:not|never) (?:able|allowed|permitted|equipped|going)|"
    r"unable|refuse|decline|rather not|prefer not|not comfortable|(?:do not|don't) (?:feel|have|wish|want)|"
    r"(?:do not|don't)(?= (?:evaluat|rate|grade|judge|assess|score)))"
)
PERCEIVE = r"(?:find|see|detect|spot|tell|identify|notice|locate|recogni[sz]e|make)"
PRAISE = r"(?:high|higher|better|good(?! conscience| faith)|more|full)"  # "I cannot give it a better grade" is a grade
ASIDE = rf"(?: (?!(?:{PERCEIVE}|{PRAISE})\b)[\w'-]+,?){{0,5}}?"
PICTURES = r"(?:images?|pictures?|photos?|photographs?|attachments?|files?|visuals?|visual inputs?|screenshots?)"
JUDGE = (
    r" (?:assist|help(?! but| \w+ing)|comply|fulfil|evaluat|rat(?:e|ing)\b|grad(?:e|ing)\b|judg|assess|scor(?:e|ing)\b|"
    r"analy[sz]|process|engage|participate|critique|compar|do (?:that|this|so)\b|answer|respond|"
    r"(?:complete|continue)(?: with)? (?:this|that|the|your) (?:request|task|conversation)|"
    rf"(?:provide|give|offer|assign|make)(?: (?!{PRAISE}\b)\w+){{0,3}}? (?:evaluation|assessment|rating|judg|analysis|"
    r"feedback|answer|response|assistance|scores?\b|grades?\b)|"
    rf"(?:view|access|open|display|look at)(?: \w+){{0,4}} {PICTURES}|(?:view|access|open) (?:it|them)\b)"
)
REASON = r"(?![^.!?]{0,40}\b(?:higher|high|above|better|more|good|beyond|positive|other than|any credit)\b)"
GIVEN = r"(?:provided|attached|given|uploaded|supplied|received|sent|shared|submitted|available|accessible)"
LOOK = r"(?:evaluate|grade|judge|rate|compare|assess|review|score|analy[sz]e|look at|work with)"
CHAT = r"in (?:this|the|your|our) (?:message|conversation|chat|prompt|request|input|context)"
HERE = (
    rf"(?= ?(?:[.,;:!?)\"]|$|so\b|to {LOOK}|{GIVEN}|you\b|here\b|directly|for me|because|that (?:you|were|was)|{CHAT}))"
)
ENDS = r"(?= ?(?:[.,;:!?)\"]|$|(?:so|and|to|for|by|yet|here|because|properly|correctly)\b))"
ENGLISH = (
    SPEAKER + NOT + ASIDE + JUDGE + REASON,
    r"\b(?:i|we)(?:'ll| will| must|'d| would| have to| need to| respectfully|'m (?:going|programmed) to){0,3} "
    r"(?:respectfully )?(?:decline|refuse|pass on)\b(?! the edit)",
    r"\b(?:i'd|i would|i) (?:much )?(?:rather|prefer) not\b",
    r"\bnot something (?:that )?(?:i|we)(?:'m| am| are| can|'re)",
    r"\b(?:beyond|outside)(?: of)? (?:my|our) (?:abilit|capabilit|scope|guideline)",
    r"\b(?:content|usage|use|safety|community|moderation|ethic\w*|openai'?s?|my|our)(?: \w+)? "
    r"(?:polic(?:y|ies)|guidelines)\b",
    r"\b(?:request|prompt|content|message)(?: was| has been| is)? (?:blocked|flagged|filtered|declined)",
    r"^(?:i'm |i am )?(?:very |so |terribly )?sorry[.! ]*$",
    rf"\b(?:no|neither) (?:\w+ ){{0,3}}?{PICTURES}(?: or {PICTURES})?"
    rf"(?: (?:was|were|is|are|has|have|been|to|be|yet|actually))* (?:{GIVEN}|{LOOK}|visible to me|{CHAT}|"
    r"(?:could|can) be (?:seen|viewed|loaded|opened|accessed))\b",
    rf"\b{PICTURES} (?:(?:was|were|is|are|has|have|had|did|does|do)(?: not|n't| never)|not|failed to)"
    rf"(?: been| be| actually| yet)* (?:{GIVEN}|load|upload|attach|c[oa]me through|show up|get through){ENDS}",
    r"\byou (?:have not|haven't|did not|didn't|forgot to) (?:\w+ )?(?:provid|attach|upload|includ|sen[dt]|shar|suppl)"
    rf"\w*[^.!?]{{0,15}}\b{PICTURES}",
    rf"\bi (?:would )?(?:need|require)(?: to (?:see|view|have))?(?: (?:the|both|an|your|these|actual))+ {PICTURES}\b",
    r"\b(?:don't|do not|didn't|did not|can't|can ?not|couldn't|could not|haven't|have not|unable to|not able to) "
    r"(?:actually |currently |directly )?(?:see|have|receive|received|find|get|gotten|detect|access|view|load|open)"
    rf"(?: access to)?(?: (?:any|an|the|your|either|both|those|these|this|that|of|actual|attached|uploaded|source|"
    rf"original|edited|result|two|input))* {PICTURES}\b{HERE}",
    r"\b(?:please|kindly|could you|can you|would you)[^.!?]{0,30}"
    rf"\b(?:provide|(?:re-?)?(?:upload|send|attach|share)|supply)\b[^.!?]{{0,30}}\b{PICTURES}",
    rf"\bwithout (?:any |an |the |seeing |access to |both |actual )*{PICTURES}\b[, ]+(?:i|we|it|there|no)\b",
    rf"\b{PICTURES} (?:could not|couldn't|can ?not|can't) be (?:loaded|opened|read|displayed|processed|accessed)",
    rf"\bonly (?:one|1|a single) (?:image|picture|photo) (?:was|is|were|has been) {GIVEN}",
    rf"\b{PICTURES} (?:is|are|seems? to be|appears? to be) missing(?= ?(?:[.,;!\"]|$|from (?:the|this|your) "
    r"(?:request|message|prompt|conversation|input)))",
    rf"\b(?:message|prompt|request|input|conversation) (?:contains?|includes?|has) no {PICTURES}\b",
)

# --- other languages --------------------------------------------------------------------------------------------------

NEAR, FAR = r"[^.!?。؟।]{0,16}?", r"[^.!?。؟।]{0,60}?"  # what may stand between, within a sentence
CHINESE_PICTURE = "(?:图片|圖片|图像|圖像|照片)(?![中里裡的上内內])"
OTHERS = {
    "German": (
        rf"\b(?:ich|wir)\b{FAR}\b(?:nicht|leider|keine?n?)\b{FAR}(?:helf|hilf|behilflich|bewert|beurteil|"
        r"bearbeit|erfull|nachkomm|unterstutz|analysier|einschatz|benot|beantwort)",
        rf"\bkeine? (?:\w+ )?(?:bild|bilder|fotos?|datei)\b{FAR}(?:bereitgestellt|angehangt|hochgeladen|"
        r"ubermittelt|beigefugt|erhalten|geschickt|gesendet|empfangen|(?:an)?sehen konnen|offnen)",
        rf"\bich\b{NEAR}\bkeine? (?:\w+ )?(?:bild|bilder|fotos?)\b{NEAR}(?:sehen|offnen|anzeigen|betracht)",
        rf"\b(?:bild|bilder|fotos?) (?:wurden?|ist|sind)\b{NEAR}nicht{NEAR}(?:bereitgestellt|angehangt|"
        r"hochgeladen|ubermittelt|beigefugt|geladen)",
        rf"\bbitte\b{FAR}\b(?:bild|bilder|fotos?)\b{NEAR}(?:hoch|bereit|senden|schicken|anhangen)",
    ),
    "French": (
        rf"\bje\b{FAR}\bn(?:e |'|e me ){NEAR}(?:peux|puis|suis|saurais|pourrai|vais){FAR}(?:aider|"
        r"evaluer|noter|juger|repondre|traiter|analyser|assister|satisfaire|donner suite|visualiser|acceder|"
        r"voir (?:l'|les |vos |d'|cette |ces )images?)",
        rf"\baucune (?:\w+ )?(?:image|photo)\b{NEAR}(?:fourni|joint|transmis|recue|envoye|telecharge)",
        rf"\bimages?\b{NEAR}(?:n'a|n'ont|ne sont|pas){NEAR}(?:fourni|joint|transmis|recue|telecharge)",
        rf"\bje n'ai (?:pas )?(?:recu|acces|vu){NEAR}images?\b",
        rf"\bveuillez\b{FAR}(?:fournir|telecharger|joindre|envoyer){NEAR}image",
    ),
    "Spanish": (
        rf"\bno (?:puedo|podemos|podre|me es posible|soy capaz|estoy (?:capacitad|autorizad|en condiciones)){FAR}"
        r"(?:ayudar|evaluar|calificar|juzgar|puntuar|valorar|procesar|cumplir|responder|analizar|asistir|continuar|"
        r"acceder|ver (?:las? |ninguna |esas? |estas? |sus? |tus? )(?:imagen|imagenes|fotos?)\b(?! de))",
        rf"\bno (?:se|he|has|ha)\b{NEAR}(?:proporcion|adjunt|recib|subi|envi|carg)\w*{NEAR}(?:imagen|foto)",
        rf"\b(?:imagen|imagenes|fotos?) no (?:fue|fueron|ha sido|han sido|se){NEAR}(?:proporcion|adjunt|envi|carg)",
        rf"\bpor favor\b{FAR}(?:proporcion|sub[ae]|adjunt|envi){FAR}(?:imagen|foto)",
    ),
    "Portuguese": (
        rf"\bnao (?:posso|podemos|poderei|consigo|me e possivel|sou capaz|estou (?:apto|autorizado)){FAR}(?:ajudar|"
        r"avaliar|julgar|pontuar|classificar|processar|atender|responder|analisar|auxiliar|acessar|"
        r"ver (?:as? |nenhuma |essas? |estas? |suas? )(?:imagem|imagens|fotos?)\b(?! de))",
        rf"\bnenhuma (?:imagem|foto)\b{NEAR}(?:fornecid|enviad|anexad|recebid|carregad)",
        rf"\bnao (?:recebi|tenho acesso){NEAR}(?:imagem|imagens|fotos?)\b",
        rf"\b(?:imagem|imagens|fotos?) nao (?:foi|foram){NEAR}(?:fornecid|enviad|anexad|recebid|carregad)",
        rf"\bpor favor\b{FAR}(?:forneca|envie|anexe|carregue){FAR}(?:imagem|imagens|foto)",
    ),
    "Italian": (
        rf"\bnon (?:posso|possiamo|potro|sono in grado|riesco|mi e possibile){FAR}(?:aiutar|valutar|giudicar|"
        r"assister|elaborar|soddisfar|risponder|analizzar|visualizzar|acceder)",
        rf"\bnessuna immagine\b{NEAR}(?:fornit|allegat|ricevut|caricat|inviat)",
        rf"\bnon (?:vedo|ho ricevuto){NEAR}immagin\w+ (?:allegat|caricat|fornit)",
        rf"\bimmagin[ei] non (?:e stata|sono state){NEAR}(?:fornit|allegat|caricat|inviat)",
    ),
    "Dutch": (
        rf"\bik\b{FAR}\b(?:niet|geen|helaas)\b{FAR}(?:help|beoordel|assister|voldoen|verwerk|analyser|"
        r"beantwoord|evaluer)",
        rf"\bgeen (?:afbeelding|foto|beeld)\w*\b{NEAR}(?:verstrekt|bijgevoegd|geupload|ontvangen|meegestuurd)",
    ),
    "Swedish, Danish, Norwegian": (
        rf"\bj[ae]g\b{FAR}\b(?:inte|ikke|ej|tyvarr|desværre|dessverre)\b{FAR}(?:hj(?:a|e|æ)lp|bedom|bedøm|"
        r"vurder|utvardera|hantera|behandl|besvar|svara)",
    ),
    "Finnish": (rf"\ben (?:voi|pysty|kykene)\b{FAR}(?:autta|arvioi|arvostel|pisteytt|kasitell|vasta)",),
    "Polish": (
        rf"\bnie (?:moge|mozemy|jestem w stanie|potrafie|bede)\b{FAR}(?:pomoc|oceni|spełni|przetworzy|odpowiedzi|"
        r"przeanalizowa)",
        rf"\bnie (?:dostarczono|przesłano|załaczono|dołaczono|otrzyma\w+){NEAR}(?:obraz|zdjec)",
    ),
    "Czech": (
        rf"\b(?:nemohu|nemuzu|nedokazu|nejsem schop\w+){FAR}(?:pomoc|pomoct|hodnoti|posoudi|vyhove|zpracova|"
        r"odpovede)",
    ),
    "Hungarian": (rf"\bnem (?:tudo[km]|segithetek|all modomban){FAR}(?:segit|ertekel|pontoz|valasz|biral|\.|$)",),
    "Romanian": (rf"\bnu (?:pot|putem|sunt in masura)\b{FAR}(?:ajut|evalu|judec|raspund|proces|asist)",),
    "Greek": (rf"δεν μπορω{FAR}(?:βοηθ|αξιολογ|βαθμολογ|απαντ|κριν)",),
    "Turkish": (
        r"yard[ıi]mc[ıi] ola(?:ma|m[ıi]yor)|yard[ıi]m edeme",
        r"(?:degerlendir|puanla|cevapla|yan[ıi]tla)y?[ea]m(?:[ae]|[ıi]yor)",
    ),
    "Russian": (
        rf"не (?:могу|можем|смогу|буду|в состоянии|имею возможности){FAR}(?:помочь|помогать|оцени|обработать|"
        r"ответить|анализировать|судить|выполнить (?:ваш|этот|эту)|увидеть изображени|просматривать)",
        rf"изображени\w*{NEAR}не (?:было |были |была )?(?:предоставлен|прикреплен|загружен|получен|приложен)",
        rf"не (?:было |были )?(?:предоставл?|прикрепи?л|загру[зж]|получен|прилож)\w*{NEAR}изображени",
    ),
    "Ukrainian": (rf"не (?:можу|зможу|маю змоги){FAR}(?:допомог|оцін|оброб|відпов)",),
    "Arabic": (
        rf"(?:لا (?:[اأ]ستطيع|يمكنني|يمكننا|[اأ]قدر)|لن (?:[اأ]ستطيع|[اأ]تمكن)|غير قادر على){FAR}"
        r"(?:مساعد|تقييم|الحكم|معالجة|تلبية|الإجابة|تحليل|رؤية الصور)",
        rf"لم يتم (?:تقديم|[إا]رفاق|تحميل|توفير){NEAR}صور",
    ),
    "Hebrew": (rf"(?:איני|אינני|לא) (?:יכול|יכולה|מסוגל|אוכל){FAR}(?:לעזור|לסייע|להעריך|לדרג|לשפוט|לענות)",),
    "Persian": (rf"نمی.?توانم{FAR}(?:کمک|ارزیابی|امتیاز|پاسخ|قضاوت)",),
    "Hindi": (rf"(?:सहायता|मदद|मूल्यांकन|आकलन|उत्तर){NEAR}नहीं (?:कर|दे) ?(?:सक|पा)",),
    "Vietnamese": (
        rf"\btoi\b{NEAR}\bkhong the\b{FAR}(?:giup|ho tro|đanh gia|cham điem|xu ly|tra loi|phan tich)",
        rf"\bkhong (?:co|nhan đuoc|thay){NEAR}(?:hinh anh|anh) nao{NEAR}(?:cung cap|tai len|đinh kem)",
    ),
    "Indonesian, Malay": (
        rf"\bsaya\b{NEAR}\b(?:tidak|tak)\b{FAR}(?:membantu|menilai|mengevaluasi|memproses|memenuhi|menjawab)",
        r"\btidak ada (?:gambar|foto) yang (?:\w+ )?(?:diberikan|dilampirkan|disediakan|diunggah)",
    ),
    "Thai": (rf"ไม่สามารถ{FAR}(?:ช่วย|ประเมิน|ให้คะแนน|ตอบ|ตัดสิน)",),
    "Chinese": (
        rf"(?:我|抱歉|对不起|對不起|不好意思){NEAR}(?:无法|無法|不能|没法|沒法|没有办法|沒有辦法|拒绝|拒絕|不便|不会|不會)"
        rf"{NEAR}(?:协助|協助|帮|幫|评|評|打分|判断|判斷|分析|处理|處理|回答|回应|回應|继续|繼續|"
        rf"提供(?!更高)|(?:查看|看到|访问|訪問|打开|打開){NEAR}{CHINESE_PICTURE})",
        rf"(?:没有?|沒有?|未|并未|並未)(?:提供|上传|上傳|附上|附带|附帶|收到|接收到|发送|發送|给出|給出){NEAR}{CHINESE_PICTURE}",
        rf"(?:没有|沒有)(?:任何)?{CHINESE_PICTURE}",
        rf"{CHINESE_PICTURE}{NEAR}(?:没有|沒有|未|并未|並未)(?:能|被)?(?:提供|上传|上傳|加载|載入|附上)",
        rf"[请請](?:您|你)?(?:先|重新)?(?:提供|上传|上傳|发送|發送|附上){NEAR}(?:图|圖|照片)",
    ),
    "Japanese": (
        rf"(?:お手伝い|評価|採点|お答え|対応|判断|分析|支援|処理|回答|お応え|ご協力){NEAR}"
        r"(?:できません|出来ません|できかねます|いたしかねます|致しかねます|しかねます|できないため|控えさせ)",
        r"画像[をが](?:確認|閲覧|表示|見る|読み込)[^。]{0,8}(?:できません|できない)",
        r"画像[がは](?:提供|添付|アップロード|送信)[^。]{0,8}(?:いません|いない|なかった|ません)",
        r"画像を[^。]{0,8}(?:提供|添付|アップロード|送信)[^。]{0,4}(?:ください|下さい|いただ)",
    ),
    "Korean": (
        r"(?:도와 ?드릴|도움을 드릴|(?:평가|채점|답변|처리|응답|판단|분석)(?:할|해 ?드릴)) 수(?:가|는)? ?(?:없|어렵)",
        r"(?:이미지|사진|그림)[를을]? ?(?:제공|첨부|업로드|전송)(?:해|하여) ?주",
        r"(?:이미지|사진|그림)[를을이가]? ?(?:볼|열|확인할) 수 없",
        r"(?:이미지|사진|그림)[이가는은도]? ?(?:제공|첨부|업로드|전송)(?:되지|하지|이 되지) ?(?:않|못)",
    ),
}
REFUSAL = re.compile(_without_accents("|".join((*ENGLISH, *(one for several in OTHERS.values() for one in several)))))


def refuses(text: str) -> bool:
    """Whether the text says that its writer does not judge, or was shown nothing that could be judged."""
    return bool(REFUSAL.search(folded(text)))
