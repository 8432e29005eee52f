"""The words by which `negation.py` understands Chinese and English negation. Data only.

Lists were written for advice texts (medicine, law, psychology, exams); the rules that use them are in `negation.py`.
"""

from __future__ import annotations

import re

# Look like a negation and are none, or carry their own object ("不要担心" negates the worry, not what follows).
PSEUDO = (
    r"不仅|不但|不光|不单|不只|不止|不论|不管|不过(?!度)|不断|不停|不久|不妨|不如|不错|不慎|不小心|不适(?!合|宜"
    r"|用)|不良"
    r"|不同|不少|不时|不明|不料|不惜|不愧|不禁|不由得|不舒服|不放心|不好意思|不客气|不一会|不等|不可避免|不可忽视"
    r"|差不多|对不起|了不起|来不及|忍不住|无论|无疑|无非|无意|别人|别的|别处|别名|别墅|特别|分别|级别|区别|个别"
    r"|性别|识别|鉴别|类别|辨别|告别|差别|非常|非处方|非甾体|是非|除非|并非只|禁食|禁区|没事|没关系|没问题"
    r"|不(?:会|懂|行|对|好)的"
    r"|(?:为什么|为何|何|怎么|干嘛|难道)不(?!能|要|可|宜|准|许|得|建议|推荐)(?:应该|应当|应|该|是)?"
    r"|(?:不要|不用|不必|无需|无须|别|切勿|请勿|切莫|不能|不可|不)(?:再)?(?:犹豫|担心|害怕|惊慌|慌张|慌|紧张"
    r"|着急|客气|迟疑"
    r"|等到|等待|等|顾虑|怀疑|要紧|怕(?:麻烦|疼|痛|花钱)?)"
    r"|\bnot (?:only|just|merely|simply)\b|\bno (?:matter|doubt|wonder)\b|\bwithout (?:delay|hesitation|fail)\b"
    r"|\b(?:do not|don't|never) (?:panic|worry|wait|be afraid)\b|\bwhy (?:not|don't you)\b|\bnever mind\b"
)
STRONG = (
    r"(?:绝对|绝|决|切|万|并|从|再|千万)?不(?:要|能够|能|可以|可能|可|宜|应该|应当|应|该|得|准|许|允许|建议"
    r"|推荐|提倡|主张|支持|鼓励|赞成|必要|必须|必|需要|需|用|会|是|适合|适宜|适用|当|想|愿意|愿|存在"
    r"|一定|主动|同意|(?=认为|以为|觉得|意味着|代表|等于|说明|相信))"
    r"|切勿|请勿|切忌|切莫|勿|莫(?!名|非)|严禁|禁止|严格禁止|禁忌(?![药证症物食])|禁用|忌(?![口讳妒])|杜绝|避免"
    r"|防止|谨防"
    r"|警惕|提防|拒绝|停止|反对|劝阻|制止|阻止|放弃|取消|中止|暂缓|推迟|拖延|延误|耽误|耽搁|忘记|忘了|忽视|忽略"
    r"|抵制|杜绝"
    r"|无需|无须|毋须|毋需|无法|无权|没有必要|没必要|没有(?:理由|权利)?|没(?![收落])|未曾|从未|尚未|并未|并非"
    r"|绝非|而非"
    r"|决非|从不|绝不|决不|难以|别"
    r"|\b(?:do|does|did|must|should|shall|can|could|will|would|may|need|is|are|was)(?: not|n't)\b|\bcannot\b"
    r"|\bnever\b"
    r"|\bnot\b|\bno (?:need|reason) to\b|\bavoid(?:ing)?\b|\brefrain(?:ing)? from\b|\bstop\b|\brefuse to\b"
    r"|\binstead of\b"
    r"|\brather than\b|\bwithout\b|\bnor\b|\bneither\b|\b(?:advise|warn|recommend)(?:s|ed)? against\b|\bagainst\b"
    r"|\b(?:wrong|dangerous|unsafe|harmful|illegal|forbidden|prohibited) to\b|\b(?:fail|forget|hesitate|delay"
    r"|refuse)\b(?: to)?"
)
# Negate only what follows at once ("不催吐", "未立即就医"); elsewhere they belong to some other verb.
WEAK = r"不|未|无|没|非"
LIGHT = (
    r"(?:自行|立即|立刻|马上|随意|随便|盲目|主动|轻易|擅自|强行|直接|急于|贸然|私自|单独|任何|有|明显|典型|及时"
    r"|按时|再|先|去|予以|予|给予|给|进行|采取"
    r"|采用|实施|使用|选择|考虑|做|行|的|地|说|能|可|够|该|应|会|要|是){0,3}"
)
# Circumstances: what they negate is not the advice ("未经医生同意", "不能就医时").
CIRCUMSTANCE = (
    r"在[^，,、：:]{1,16}?(?:情况下|前提下|条件下|指导下|之前|之后|以前|期间|(?<![及随按同平暂定])时|前|后)"
    r"|(?:不(?![要可宜应得能准许会用必需该]|建议|推荐)|无(?![需须])|没(?!有?必要)|未"
    r"|非)[^，,、：:]{0,12}?(?:情况下|前提下|时候|的话|之前|以前"
    r"|(?<![及随按同平暂定有小临当何])时(?![间候刻机]))"
    r"|(?:忘记|忘了|漏了|错过)[^，,、：:]{0,10}?(?:时候|时|之后|后)"
    r"|未(?!必)[^，,、：:]{1,10}?前"
    r"|(?:未经|未获|没经过|没有经过)[^，,、：:]{0,10}?(?:指导|同意|允许|许可|批准|评估|建议|确认|诊断|授权|处方"
    r"|医嘱)(?:下|而)?"
    r"|(?:没有|无|缺乏)(?:医生|医师|专业人员|医嘱|处方|律师|他人)[^，,、：:]{0,6}?(?:指导|同意|允许|建议|陪同"
    r"|帮助)(?:下)?"
    r"|(?:如果|若|假如|要是|一旦|倘若|如)[^，,、：:应可需须则就便]{0,14}?(?=应|可|需|须|则|就|便)"
    r"|\bif (?:you|they|he|she|it)?[^,]{0,40}?(?=\b(?:should|must|please|then)\b)"
)
# These state what is the case; 就 after them starts what follows from it ("不会做就抄答案"). 不要, 禁止 … do not.
STATES = r"(?:并|从)?不(?:会|能|能够|想|愿|愿意|是|可能)|没有?|无法|难以|尚未|未曾|从未"
CONSEQUENCE = r"[就则便]"
# A new instruction between the negation and the words: the negation does not reach them ("不要喝水应立即催吐").
BREAK = (
    r"(?<![反适效响供相])应(?![用激急付酬])|必须|务必|可以|建议|推荐|(?<!邀)请|然后|接着|随后|同时"
    r"|并(?:且)?(?:立即|马上|尽快|应|要|可|须)"
    r"|(?<![患或作学记])者(?!的)|的(?:患者|病人|人群|人|孩子|儿童|老人|孕妇|情况|当事人|学生|考生|来访者|员工|一方)"
    r"|\b(?:should|must|please|then)\b"
)
# A gap that opens so is governed by the negation as a whole ("不要给昏迷的患者催吐", "不认为应该催吐").
GOVERNED = (
    r"\s*(?:建议|推荐|要求|鼓励|允许|提倡|主张|让|叫|劝|认为|以为|觉得|相信|听信|轻信|误信|误以为|说|表示"
    r"|意味着|代表|等于|表明|说明"
    r"|承诺|保证|宣称|声称|因为|因|为了|为|由于|仅凭|凭|一|随|自|轻|盲|擅|给|对|让|在|替|帮|用|向|把|将|[“\"「『]"
    r"|think|believe|say|assume|mean|claim|promise|recommend|suggest|tell)"
)
COORDINATOR = r"[、和与及或也更并且又还就则便，,；;的]|\b(?:and|or|nor)\b"
CONTRAST = (
    r"[，,：:](?!\d{3}\b)|(?<!不)但(?:是)?|然而|而是|而应|而要|可是|反而|(?<![忘冷退])却|\bbut\b"
    r"|\binstead\b(?! of)|\bhowever\b"
)
CONTINUES = r"\s*(?:或者?|以及|及|甚至|\bn?or\b)"
AFTERWARDS = (
    r"[”\"』」’）)]?(?:的)?(?:[^，,。避防减降]{0,8}?)(?:(?:是|属于?|均为|都是|为|完全|绝对|非常|极其|十分|很|并"
    r"|也|均|都){0,3})"
    r"(?:错误|错的|不对|不可取|不可行|不可信|不科学|不正确|不合适|不妥|不当|不合法|不安全|不被允许|不允许"
    r"|不提倡|不推荐|不行|不可以"
    r"|不宜|没有(?:科学)?(?:依据|根据|必要)|没必要|无效|有害|危险|风险(?:很|极|较)?大|禁忌|禁止|被禁|误区|谣言"
    r"|迷信|违法|违规|侵权|犯罪|骗局|陷阱|学术不端|不端行为"
    r"|(?:会|可能|可|容易|易|将|往往|反而|只会){1,3}(?:导致|造成|加重|引起|引发|增加|损伤|损害|加剧|延误|掩盖"
    r"|危及|适得其反|强化|诱发|伤害|影响)"
    r"|加重|导致|造成|(?:不可|不能|不应|不要)(?:取|[。！!]?$))"
    r"|[^,.;]{0,30}?\b(?:is|are|was|can be|may be|should be|must be)\s+(?:\w+ly |very |also )?(?:wrong"
    r"|dangerous|forbidden|prohibited"
    r"|contraindicated|harmful|avoided|unsafe|not (?:recommended|advised|safe|allowed|appropriate|advisable)"
    r"|discouraged|illegal"
    r"|a mistake|a myth)\b|[^,.;]{0,20}?\b(?:can|may|will|could) (?:cause|worsen|lead to|harm|damage|increase)\b"
)
LABEL = (
    r"(?:误区|错误|谣言|禁忌|禁止|严禁|不要|不能|不可|不应|不宜|避免|切勿|忌|\bmyths?\b|\bavoid\b|\bdon'ts?\b"
    r"|\bdo not\b)"
    r"[^，,。：:？?]{0,14}[：:]"
)
REPORT = (
    r"有人|有些人|很多人|不少人|网上|网络|民间|传言|流传|传统|偏方|听说|据说|老话|误以为|误认为|以为|所谓|谣言"
    r"|迷信|坊间|朋友圈"
    r"|\b(?:some|many) people\b|\bit is (?:often )?said\b|\bmyth\b"
)
POINTS_BACK = (
    r"[”\"』」’\s]*(?:但(?:是)?|然而|其实|实际上|事实上|而)?[，,\s]*(?:这|此|该|那|上述|以上|前述|其实|实际上"
    r"|事实上|是|属于|都是|均|this|that|it|these|such)"
)
WRONG = (
    r"错误|错的|不对|不正确|不可取|不可信|不科学|不可行|不妥|不安全|没有(?:科学)?(?:依据|根据)|误区|谣言|迷信"
    r"|有害|危险|违法|骗局|禁忌|被禁止"
    r"|(?:会|可能|容易|只会)[^，,。]{0,6}(?:导致|造成|加重|引起|增加|损伤|延误|加剧)"
    r"|\b(?:wrong|false|dangerous|harmful|a myth|incorrect|not true|untrue)\b"
)
REBUTTED = (
    r"(?:但|其实|实际上|事实上|然而)[^。]{0,40}?(?:不能|不可|不应|不宜|不要|切勿|禁止|并不|加重|损伤|有害|危险|错)"
)
ASKED = r"是否|能否|可否|应否|会否|能不能|可不可以|要不要|该不该|会不会|是不是|应不应该|需不需要|有没有必要|\bwhether\b"
TAG_QUESTION = (
    r"[，,]\s*(?:好吗|好不好|对吗|对吧|是吗|行吗|可以吗|(?:你)?(?:明白|知道|懂|记住|清楚)了?吗|ok|okay|right"
    r"|understood)\s*[？?]$"
)
RHETORICAL = r"(?:为什么|为何|何|怎么|干嘛|难道)不(?!能|要|可|宜|准|许|得|建议|推荐)|\bwhy (?:not|don't you)\b"


def compile_words(words: str) -> re.Pattern[str]:
    """Compile one of the lists above, in any case."""
    return re.compile(words, re.IGNORECASE)
